"""Train recommenders on CPUs at 4 bits.

The parts are imported by name: ``dqrm.data``, ``dqrm.models``, ``dqrm.training``,
``dqrm.serving``, ``dqrm.kernels``, ``dqrm.comm``. Importing ``dqrm`` itself imports none of
them, so that the command line answers at once.
"""

from pkgutil import extend_path

# Started from a checkout, Python finds this folder before the installed package;
# comm/, data/, kernels/ and pipelines/ sit beside it, not in it, so look on.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
