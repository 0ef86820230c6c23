"""titan_vlm: training of mixture-of-experts vision-language models in pure PyTorch."""

__version__ = "0.1.0"
