"""megabts' models in EleutherAI's lm-evaluation-harness, as its model "megabts". Importing this module registers it.

Every method runs alike: log-likelihoods and generation need no more than `embed`, `run_layers` and `logits`. Text
becomes tokens by the rules of the harness' own Hugging Face models, so both give the same numbers on the same weights:
a tokenizer's template adds its tokens in front (`special_tokens=False` switches that off), spaces that end a context
begin its continuation, an empty context is the prefix token (the beginning-of-sequence token, else the end of a
document), and what is too long loses tokens on the left. What a log-likelihood is for models that learn about a text
while they read it stands in `likelihood.py`.

Several ranks (torchrun) hold a model each and share the requests, or hold one together: `tensor` x `expert` of them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megabts.build import load_model, open_model
from megabts.config.run import ParallelConfig
from megabts.errors import UsageError, UserError
from megabts.evaluation.likelihood import continuation_scores
from megabts.inference.engine import Engine, cache_size
from megabts.inference.ranks import follow
from megabts.inference.rows import Request
from megabts.inference.settings import GenerationSettings
from megabts.parallel.collectives import broadcast_object, gather_objects
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.runtime.device import DTYPES, Launch, pick_device, share_cores, start_communication
from megabts.runtime.rendezvous import meet
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.hugging_face import HuggingFaceTokenizer
from megabts.tokenizers.protocol import Tokenizer

ARGUMENTS = (
    "checkpoint",
    "dtype",
    "batch_size",
    "without",
    "tokenizer",
    "tensor",
    "expert",
    "max_length",
    "max_gen_toks",
    "special_tokens",
)
"""What --model_args may hold."""
FROM_HARNESS = ("max_batch_size", "device")
"""What the harness adds to them."""
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
"""Generation keywords of a task that are GenerationSettings' fields."""

logger = logging.getLogger(__name__)


@register_model("megabts")
class MegabtsLM(TemplateLM):
    """A checkpoint of any method, or a Hugging Face folder, that the harness can ask.

    `without`: experts of a BTS model to leave out, joined by "+". `batch_size`: texts scored, or completed, at a time.
    `max_length`: tokens read at once, at most and by default model.max_seq_len. `dtype` as in tools/evaluate.py.
    `device` "cpu" is obeyed; else a rank takes its GPU where there is one. Raises UserError, UsageError.
    """

    def __init__(
        self,
        checkpoint: str,
        dtype: str | None = None,
        batch_size: int | str = 1,
        without: str | Sequence[str] = "",
        tokenizer: str = "",
        tensor: int = 1,
        expert: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        special_tokens: bool = True,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        launch = Launch.from_environment()
        self.mesh, self._device = _join(launch, ParallelConfig(tensor=tensor, expert=expert), device)
        stored = open_model(checkpoint)
        if stored.config.method == "moe":
            self.mesh = self.mesh.routed
        parallel = ParallelConfig(tensor=tensor, expert=expert, exchange=stored.config.parallel.exchange)
        stored = replace(stored, config=replace(stored.config, parallel=parallel))
        names = without.split("+") if isinstance(without, str) else list(without)
        whole = self.mesh if tensor * expert > 1 else ParallelMesh()
        loaded = load_model(stored, whole, _dtype(dtype), self._device, without=[name for name in names if name])
        self.model, self.method = loaded.model, loaded.config.method
        self.model.train(False)
        self.parts = whole
        """The ranks that hold this model together."""
        spec = loaded.tokenizer_or(tokenizer)
        self.plain = build_tokenizer(spec)
        self.templated = build_tokenizer(spec, include_special_tokens=True) if special_tokens else self.plain
        vocabulary = self.model.config.vocab_size
        if self.plain.vocab_size > vocabulary:
            raise UserError(
                f"tokenizer {spec} has {self.plain.vocab_size} ids and the model a vocabulary of {vocabulary}; give "
                "the tokenizer that the model was trained with"
            )
        first = _prefix_token(self.plain, self.templated)
        self._prefix = self.plain.eod_id if first is None else first
        self._begins = "" if self._prefix is None else self.plain.decode([self._prefix])
        self.batch_size = _batch_size(batch_size)
        self.max_gen_toks = max_gen_toks
        self.max_length = max_length or self.model.config.max_seq_len
        if not 1 <= self.max_length <= self.model.config.max_seq_len:
            raise UsageError(
                f"max_length is {max_length}; it must lie in 1..{self.model.config.max_seq_len} (model.max_seq_len)"
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "MegabtsLM":
        """From --model_args, which win over what the harness adds (its own --batch_size is 1 where not given)."""
        unknown = [name for name in arg_dict if name not in ARGUMENTS + FROM_HARNESS]
        if unknown or "checkpoint" not in arg_dict:
            what = f"there is no model argument {unknown[0]}" if unknown else "the model argument checkpoint is missing"
            raise UsageError(f"{what}; --model_args takes checkpoint=DIR and any of {', '.join(ARGUMENTS[1:])}")
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**added, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "MegabtsLM":
        """As `create_from_arg_obj`, from "checkpoint=DIR,dtype=float32"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        if self.plain.eod_id is None:
            raise UserError(f"tokenizer {self.plain.name} has no end-of-document token; tasks need one")
        return self.plain.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        if self._prefix is None:
            raise UserError(f"tokenizer {self.plain.name} has no token to begin a text with; tasks need one")
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return self.plain.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; with the template's tokens, unless that is refused or they are there already."""
        if add_special_tokens is None:
            add_special_tokens = not (self._begins and string.startswith(self._begins))
        return (self.templated if add_special_tokens else self.plain).encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness has it, without its progress bar, which would be drawn in logs, too."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], windows: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(text or None, context's ids, continuation's ids) -> (log-likelihood in nats, whether greedy) of each."""
        for text, context, continuation in requests:
            if not context or not continuation:
                raise UserError(f"{text!r} leaves nothing to score or to condition on in tokens of {self.plain.name}")
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        self._tell_of_cut(cut, len(requests), f"{self.max_length} tokens")
        with self._bar(len(requests), "log-likelihoods") as bar:
            scores = continuation_scores(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch_size=self.batch_size,
                eod_id=self.plain.eod_id,
                windows=windows,
                by_prompt=self.method == "routing",
                on_scored=bar.update,
            )
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats: windows that follow one another, each token predicted once.

        The first window begins with the prefix token, later ones with the token before them; the last one reaches back
        as far as it can.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, windows=True))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions up to the first of their `until` strings or the end of the document.

        Contexts are cut on the left to leave room for `max_gen_toks` tokens.
        """
        asked, cut = [], 0
        for row, (context, keywords) in enumerate(request.args for request in requests):
            settings = self._settings(keywords)
            room = self.max_length - settings.max_new_tokens
            if room < 1:
                raise UserError(
                    f"a task asks for {settings.max_new_tokens} tokens and the model has room for {self.max_length} in "
                    "all; set max_gen_toks lower, or take a model with a larger model.max_seq_len"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            cut += len(ids) > room
            asked.append(Request(ids[-room:], settings, row))
        self._tell_of_cut(cut, len(requests), f"{self.max_length} tokens with their completions")
        return self._complete(asked) if asked else []

    def _complete(self, asked: Sequence[Request]) -> list[str]:
        """The requests' texts, on every rank."""
        max_tokens = sum(sorted(map(cache_size, asked), reverse=True)[: self.batch_size])
        texts: list[str] = []
        if self.parts.rank > 0:
            follow(self.model, max_tokens, self.parts)
        else:
            engine = Engine(self.model, self.batch_size, max_tokens, tokenizer=self.plain, mesh=self.parts)
            with engine, self._bar(len(asked), "completions") as bar:
                rows = [engine.submit(request) for request in asked]
                while engine.busy:
                    bar.update(sum(event.finish is not None for event in engine.step()))
            texts = [row.text for row in rows]
        return broadcast_object(texts) if self.parts.world_size > 1 else texts

    def _settings(self, keywords: Mapping[str, Any]) -> GenerationSettings:
        """A task's generation_kwargs as settings. Raises UsageError for one that megabts does not know."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(keywords), self.max_gen_toks))
        until, length, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        unknown = [name for name in given if name not in SAMPLING]
        if unknown:
            raise UsageError(
                f"a task's generation_kwargs hold {unknown[0]}; megabts knows until, max_gen_toks, do_sample, "
                f"{', '.join(SAMPLING)}"
            )
        chosen = {name: given[name] for name in SAMPLING if given.get(name) is not None}
        temperature = float(chosen.pop("temperature", 1.0)) if sampled else 0.0
        return GenerationSettings(
            max_new_tokens=length,
            **{**chosen, "temperature": temperature},
            stop_ids=() if self.plain.eod_id is None else (self.plain.eod_id,),
            stop_strings=tuple(dict.fromkeys(text for text in until if text)),
            eod_id=self.plain.eod_id,
            num_ids=self.plain.vocab_size,
        )

    def _bar(self, total: int, what: str) -> tqdm:
        """Progress by the first rank, if its stderr is a terminal."""
        return tqdm(total=total, desc=what, disable=self.mesh.rank > 0 or None)

    def _tell_of_cut(self, cut: int, total: int, room: str) -> None:
        if cut and self.mesh.rank == 0:
            logger.warning("%d of %d contexts were cut on the left: the model reads %s", cut, total, room)

    @property
    def rank(self) -> int:
        """This rank's place among those that share the requests."""
        return self.mesh.rank if self.parts.world_size == 1 else 0

    @property
    def world_size(self) -> int:
        """How many share the requests."""
        return self.mesh.world_size if self.parts.world_size == 1 else 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of all ranks, one after the other."""
        return torch.cat([torch.as_tensor(part).reshape(-1) for part in gather_objects(tensor.tolist())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Of all ranks, on `dst`; None elsewhere."""
        found = gather_objects(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        gather_objects(None)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness' record of a run."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"method": self.method, "model_num_parameters": parameters, "model_dtype": str(self.model.dtype)}


def _join(launch: Launch, parallel: ParallelConfig, device: str | None) -> tuple[ParallelMesh, torch.device]:
    """This rank's place, and its device. Raises UsageError where neither one model nor one each fills the ranks."""
    degrees = parallel.tensor * parallel.expert
    if degrees not in (1, launch.world_size):
        raise UsageError(
            f"tensor {parallel.tensor} x expert {parallel.expert} = {degrees} ranks hold a model and there are "
            f"{launch.world_size}; start {degrees} ranks, or leave both out: then every rank holds a model"
        )
    share_cores(launch)
    chosen = torch.device("cpu") if device == "cpu" else pick_device(launch)
    if launch.world_size > 1 and not torch.distributed.is_initialized():
        meeting = meet(launch, parallel.timeout)
        start_communication(launch, chosen, parallel.backend, parallel.timeout, meeting.store if meeting else None)
    return build_mesh(parallel, launch.world_size, launch.rank), chosen


def _dtype(name: str | None) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise UsageError(f"dtype is {name}; give one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _batch_size(given: int | str) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise UsageError(f"batch_size is {given}; give a number of texts, at least 1 (there is no auto here)")
    return int(given)


def _prefix_token(plain: Tokenizer, templated: Tokenizer) -> int | None:
    """The beginning-of-sequence token: what a template puts first, or what a Hugging Face tokenizer's side files name.

    None where there is none.
    """
    added = templated.encode("")
    if added:
        return added[0]
    return plain.named_token("bos_token") if isinstance(plain, HuggingFaceTokenizer) else None
