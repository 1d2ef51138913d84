"""One thread per worker; the shape annotations of the shared layers are checked while the tests run."""

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook(["common.attention", "common.layers"], "beartype.beartype")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
