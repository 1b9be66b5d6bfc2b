"""sampo: preference-tune a chat model with SamPO on one GPU, without making it verbose."""

__version__ = "0.1.0"
