import pytest
from datasets import Dataset

from tests import tiny


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.parquet"
    Dataset.from_dict({"text": tiny.TEXTS}).to_parquet(path)
    return str(path)
