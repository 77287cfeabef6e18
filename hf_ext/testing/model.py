"""The contract of a causal language model: what users may expect of any architecture, as tests to inherit.

    from hf_ext.testing.model import ModelContract

    class TestMyModel(ModelContract):
        model_class = MyForCausalLM
        invalid_options = [({"hidden_size": 0}, "hidden_size")]

        def config(self, **options):
            return MyConfig(**{"vocab_size": 64, "hidden_size": 32, **options})

The tests are spread over three modules by what they look at; this one joins them.
"""

from hf_ext.testing.model_forward import ForwardContract
from hf_ext.testing.model_storage import StorageContract
from hf_ext.testing.model_training import TrainingContract


class ModelContract(ForwardContract, StorageContract, TrainingContract):
    """All tests of the contract. See `ContractBase` for what a subclass sets."""
