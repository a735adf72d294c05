"""Checkpoint folder → Hub repository."""

import logging

# What libraries say of themselves is not the user's to mend, and hides the one line about what is: kernels that are
# not there, and each retry of the Hub. Silenced before any of them is imported.
for _name in ("bitsandbytes.backends.cpu.ops", "huggingface_hub.utils._http"):
    logging.getLogger(_name).setLevel(logging.ERROR)
