"""Data: images from snapshots, the Hugging Face hub or scikit-learn, and the 2D toy."""

from lib.data.images import DataError, ImageSet, load

__all__ = ["DataError", "ImageSet", "five_gaussians", "load"]


def __getattr__(name: str):
    # toy.py needs torch, which whoever only wants images should not wait for.
    if name == "five_gaussians":
        from lib.data.toy import five_gaussians

        return five_gaussians
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
