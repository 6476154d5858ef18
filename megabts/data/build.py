"""From a run's data section to the datasets it trains and validates on, with what must agree checked beforehand.

Training reads a blend of shuffled samples; validation reads each domain by itself and in order. A dataset says what it
was tokenized with in the JSON sidecar beside its .idx file; data without one (made by other tools) is scanned once for
its largest token instead, which reads the whole .bin file unless `data.cache` remembers the answer.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence

import numpy as np

from megabts.config.run import DataConfig
from megabts.data.blend import BlendedDataset, check_weights
from megabts.data.index_cache import IndexCache, dataset_key, file_state
from megabts.data.indexed import IndexedDataset, dataset_prefix
from megabts.data.samples import SPLITS, Dataset, SampleDataset, normalise, plan_epochs, split_ranges
from megabts.data.sidecar import require_same_tokenizer
from megabts.data.validation import ValidationSet
from megabts.errors import UsageError, UserError
from megabts.tokenizers.protocol import Tokenizer

_SURPLUS = 0.005
"""Share of samples a blended dataset holds beyond its part, as in Megatron-LM; it can decide the number of epochs."""


def build_train_dataset(
    config: DataConfig, num_samples: int, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> Dataset:
    """The training samples: one shuffled dataset, or a blend of several.

    Args:
        config: which datasets, in which proportions; those of weight 0 are left out.
        num_samples: samples the whole run takes. It decides how many epochs are shuffled together, hence the order.
        tokenizer: the run's; None: datasets are compared with each other only.
        vocab_size: tokens the model knows; None: not checked.

    Returns:
        A dataset of at least `num_samples` samples of `config.seq_length` + 1 tokens.

    Raises:
        UserError: a dataset is missing, damaged, too small, or not made with the run's tokenizer.
    """
    weights = _train_weights(config)
    indexed = [IndexedDataset(prefix) for prefix in weights]
    _check_tokenizers(indexed, tokenizer)
    _check_vocabulary(indexed, vocab_size, config.cache)
    datasets = []
    for source, size in zip(indexed, _dataset_sizes(list(weights.values()), num_samples), strict=True):
        begin, end = split_ranges(config.split, len(source))[0]
        cache = config.cache or None
        datasets.append(SampleDataset(source, begin, end, size, config.seq_length, config.seed, cache))
    if len(datasets) == 1:
        return datasets[0]
    return BlendedDataset(datasets, list(weights.values()), num_samples)


def build_valid_datasets(
    config: DataConfig,
    num_samples_per_domain: int | None,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> dict[str, ValidationSet]:
    """Validation windows by domain: `config.valid`, or else the valid parts of the training datasets' split.

    The latter are named by the last part of their paths. No validation data gives an empty dictionary.

    Args:
        config: the run's data section.
        num_samples_per_domain: most windows per domain, spread evenly; None: all.
        tokenizer, vocab_size: as for `build_train_dataset`.

    Raises:
        UserError: as for `build_train_dataset`; two training datasets have one name.
    """
    prefixes = dict(config.valid) or _valid_parts(config)
    indexed = {domain: IndexedDataset(prefix) for domain, prefix in prefixes.items()}
    train = [IndexedDataset(prefix) for prefix in _train_weights(config)] if indexed and config.train else []
    _check_tokenizers([*train, *indexed.values()], tokenizer)
    _check_vocabulary(list(indexed.values()), vocab_size, config.cache)
    datasets = {}
    for domain, source in indexed.items():
        begin, end = (0, len(source)) if config.valid else split_ranges(config.split, len(source))[1]
        datasets[domain] = ValidationSet(source, begin, end, config.seq_length, num_samples_per_domain)
    return datasets


def data_identity(config: DataConfig, num_samples: int) -> dict[str, object]:
    """All that fixes the order of the training samples, as JSON: equal identities read equal samples in equal order.

    `num_samples` enters by the epochs it takes, so a run made longer within the same epoch keeps its identity. A
    dataset enters by name, sizes and times of change, not by folder.
    """
    weights = _train_weights(config)
    datasets = []
    for (prefix, weight), size in zip(
        weights.items(), _dataset_sizes(list(weights.values()), num_samples), strict=True
    ):
        source = IndexedDataset(prefix)
        begin, end = split_ranges(config.split, len(source))[0]
        plan = plan_epochs(int(source.lengths[begin:end].sum(dtype=np.int64)), config.seq_length, size)
        datasets.append(
            {
                "name": os.path.basename(prefix),
                "weight": weight,
                "sequences": [begin, end],
                "files": file_state(prefix),
                "epochs": plan.epochs,
                "last_epoch_apart": plan.separate_last,
            }
        )
    return {"seq_length": config.seq_length, "seed": config.seed, "datasets": datasets}


def data_hash(config: DataConfig, num_samples: int) -> str:
    """SHA-256 of `data_identity`: a resumed run whose hash differs would see other data, or the same in another
    order."""
    return hashlib.sha256(json.dumps(data_identity(config, num_samples), sort_keys=True).encode()).hexdigest()


def _train_weights(config: DataConfig) -> dict[str, float]:
    """Prefixes to read with their shares; datasets of weight 0 are left out."""
    if not config.train:
        raise UsageError("data.train is empty; give at least one {prefix: weight}")
    check_weights(list(config.train.values()), len(config.train))
    kept: dict[str, float] = {}
    for prefix, weight in config.train.items():
        if dataset_prefix(prefix) in kept:
            raise UsageError(
                f"data.train names {dataset_prefix(prefix)} twice; give it once, with the sum of the weights"
            )
        if weight > 0:
            kept[dataset_prefix(prefix)] = weight
    return dict(zip(kept, normalise(list(kept.values())), strict=True))


def _dataset_sizes(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples to build of every dataset."""
    if len(weights) == 1:
        return [num_samples]
    return [math.ceil(math.ceil(num_samples * weight) * (1 + _SURPLUS)) for weight in weights]


def _valid_parts(config: DataConfig) -> dict[str, str]:
    """Training prefixes by name when the split has a valid part."""
    begin, end = split_ranges(config.split, 1_000_000_000)[SPLITS.index("valid")]
    if begin == end or not config.train:
        return {}
    parts: dict[str, str] = {}
    for prefix in _train_weights(config):
        name = os.path.basename(prefix)
        if name in parts:
            raise UsageError(f"{parts[name]} and {prefix} are both named {name}; name them in data.valid")
        parts[name] = prefix
    return parts


def _check_tokenizers(datasets: Sequence[IndexedDataset], tokenizer: Tokenizer | None) -> None:
    """Refuse datasets not made with the run's tokenizer, or with different ones; without sidecar nothing is known."""
    known = [dataset for dataset in datasets if dataset.sidecar.get("tokenizer_fingerprint") is not None]
    for dataset in known:
        if tokenizer is not None:
            require_same_tokenizer(dataset.prefix, dataset.sidecar, tokenizer)
        elif dataset.sidecar["tokenizer_fingerprint"] != known[0].sidecar["tokenizer_fingerprint"]:
            raise UserError(
                f"{dataset.prefix} was tokenized with {_made_with(dataset)}, {known[0].prefix} with "
                f"{_made_with(known[0])}; tokenize one of them again"
            )


def _made_with(dataset: IndexedDataset) -> str:
    return f"{dataset.sidecar.get('tokenizer')} (sha {str(dataset.sidecar['tokenizer_fingerprint'])[:8]}..)"


def _check_vocabulary(datasets: Sequence[IndexedDataset], vocab_size: int | None, cache: str) -> None:
    """Refuse datasets with tokens the model does not know."""
    if vocab_size is None:
        return
    for dataset in datasets:
        stated = dataset.sidecar.get("vocab_size")
        if isinstance(stated, int):
            if stated <= vocab_size:
                continue
            raise UserError(
                f"{dataset.prefix}: data was tokenized with a vocabulary of {stated}, model.vocab_size is {vocab_size}"
            )
        largest = _max_token(dataset, cache)
        if largest >= vocab_size:
            raise UserError(f"{dataset.prefix}: data holds token {largest}, model.vocab_size is {vocab_size}")


def _max_token(dataset: IndexedDataset, cache: str) -> int:
    if not cache:
        return dataset.max_token()

    def scan() -> dict[str, np.ndarray]:
        return {"max_token": np.array([dataset.max_token()], dtype=np.int64)}

    key = dataset_key(dataset.prefix, [])
    return int(IndexCache(cache).get(key, {"max_token": (1,)}, scan)["max_token"][0])
