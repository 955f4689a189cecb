"""Before anything imports huggingface_hub: no test waits for a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
