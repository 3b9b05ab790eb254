"""The commands that take weights in and out, and all that needs PyTorch for it.

importing.py    import_model: any source (read by `dvi_jax.importing`) -> checkpoint directory
exporting.py    export_checkpoint: checkpoint directory -> orbax export or Hugging Face directory
torch_file.py   pytorch_model.bin        pickle_check.py   looking through pickles before PyTorch does
kangaroo.py     Kangaroo adapter directories
"""

from __future__ import annotations
