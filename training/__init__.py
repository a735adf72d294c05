"""Stages: each is `python -m training.STAGE`, each has `main(args)`; rooms hold what they share."""

import logging
import warnings

# What libraries say of themselves is not the user's to mend, and hides the one line about what is: kernels that are
# not there, each retry of the Hub, and a default of trl's own. Silenced before any of them is imported.
for _name in ("bitsandbytes.backends.cpu.ops", "huggingface_hub.utils._http"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
