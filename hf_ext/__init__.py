"""hf_ext: the methods of the language-modelling literature, usable from Hugging Face code.

Importing this package registers its architectures with transformers' Auto classes. The
registration waits until transformers' own Auto modules are loaded, so that importing hf_ext
imports neither torch nor transformers.
"""

from hf_ext.registration import register_when_ready

__version__ = "0.1.0"

register_when_ready()
