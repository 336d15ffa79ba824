__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=[
    "cli", "core", "datasets", "distributed", "embeddings", "evaluators", "experiments", "explorers", "images",
    "losses", "metrics", "models", "plots", "pooling", "trainers", "volumes",
])
