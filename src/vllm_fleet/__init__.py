"""vllm-fleet: many vLLM instances as one service. Importing this package loads neither torch nor vLLM."""

__version__ = "0.1.0"
