"""Getting weights in: Hugging Face directories and GGUF files to the base tree, without torch.

source.py       open_source, load_base: any source -> config, tokenizer, weights
cache.py        open_checkpoint: a checkpoint, or anything that can be imported, which is done once into the cache
checkpoint.py   write_import: a source -> checkpoint directory
hf.py           Hugging Face configs, in both directions     gguf.py   the same for GGUF
families.py     which architectures are a Llama, and what the others have that this one lacks
layout.py       the key table: which source tensor lands where in the base tree
tensors.py      streaming named tensors into that tree, with every name and shape checked
weight_files.py, safetensors_file.py, gguf_file.py, sentencepiece_file.py    the file formats, read defensively
tokenizer.py    tokenizer.json of a source; tokenizer_config.py what stands beside it, tokenizer_complete.py both
                together, tokenizer_build.py made from a byte-level vocabulary, sentencepiece_build.py from the other
end_tokens.py   which tokens end a generation, by llama.cpp's rules
"""

from __future__ import annotations
