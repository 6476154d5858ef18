"""The methods of a comparison by name. Scripts ask before anything is installed: importing this takes Python alone."""

from megabts.config.methods import FORMS

UPCYCLED: dict[str, tuple[str, ...]] = {
    "btx-top2": ("btx", "--routing", "topk"),
    "btx-switch": ("btx", "--routing", "switch"),
    "btx-soft": ("btx", "--routing", "soft"),
    "btx-sample": ("btx", "--routing", "sample"),
    "sparse-upcycling": ("sparse",),
    "bam": ("bam",),
    "bam-adapters": ("bam-adapters",),
}
"""Method and arguments of `tools/upcycle.py`."""

METHODS = ("dense-data-matched", "dense-compute-matched", "soup", "btm", "expert-routing", *UPCYCLED, *FORMS)
"""All of them, as tables list them; `--ablations` adds more forms of the stitches."""
