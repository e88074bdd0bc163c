"""Every test: one thread, so that workers do not fight for cores and sums have one order; no network."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

torch.set_num_threads(1)
