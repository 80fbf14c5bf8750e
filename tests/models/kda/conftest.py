"""Every implementation in turn; Triton's where it can run."""

import pytest

from tests.models.kda.oracles import SUBJECTS, Subject


@pytest.fixture(params=SUBJECTS, ids=str)
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param.impl == "triton":
        request.getfixturevalue("triton_kernels")
    return request.param
