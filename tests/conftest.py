import sys
from pathlib import Path

import torch

# tests import their helpers by name, wherever they are run from
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(2)
