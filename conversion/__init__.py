"""Getting weights in and out: Hugging Face directories and GGUF files to checkpoints, and back.

importing.py    import_model: any source -> checkpoint directory
exporting.py    export_checkpoint: checkpoint directory -> orbax export or Hugging Face directory
layout.py       the key table: which source tensor lands where in the fused base tree
tensors.py      streaming named tensors into that tree, with every name and shape checked
hf.py           Hugging Face configs and weight files        gguf.py       the same for GGUF
safetensors_file.py, torch_file.py, gguf_file.py, sentencepiece_file.py    the file formats, read defensively
pickle_check.py looking through pickles before PyTorch does
tokenizer.py    tokenizer.json and chat template of a source  tokenizer_build.py   made from vocabularies
kangaroo.py     Kangaroo adapter directories
"""

from __future__ import annotations
