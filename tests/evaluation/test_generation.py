"""Our own loop writes lm-eval's answers; rows end early, and draws belong to their request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evomerge.evaluation.generation import Generator, Request, Sampling, agrees, options_of
from evomerge.evaluation.live_lm import LiveLM
from tests.examples import examples

from .conftest import LETTERS, new_model, new_tokenizer

MODEL = new_model()
TOKENIZER = new_tokenizer()
prompts_of_letters = st.lists(
    st.lists(st.sampled_from(LETTERS), min_size=1, max_size=20).map(" ".join), min_size=1, max_size=9
)


def asked(prompts: list[str], **options: Any) -> list[Any]:
    options = {"until": ["a b"], "max_gen_toks": 8, "do_sample": False, **options}
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, options), idx=0)
        for prompt in prompts
    ]


def live(batch_size: int = 4, **options: Any) -> LiveLM:
    lm = LiveLM(TOKENIZER, batch_size=batch_size, max_length=options.pop("max_length", None))
    lm.attach(MODEL)
    return lm


@settings(max_examples=examples(25), deadline=None)
@given(prompts_of_letters, st.integers(1, 5), st.sampled_from([[], ["a b"], ["a", "c"], ["<eos>"]]))
def test_answers_are_those_of_lm_eval(prompts: list[str], batch_size: int, until: list[str]) -> None:
    found = live(batch_size).generate(asked(prompts, until=until), seed=0)
    expected = HFLM(pretrained=MODEL, tokenizer=TOKENIZER, batch_size=batch_size).generate_until(
        asked(prompts, until=until), disable_tqdm=True
    )
    assert [answer.text for answer in found] == expected


def test_long_prompts_are_cut_from_the_left_as_lm_eval_does() -> None:
    prompts = ["a b c d e f g h " * 5, "b a"]
    lm = live(max_length=20)
    found = lm.generate(asked(prompts), seed=0)
    assert lm.continues
    reference = HFLM(pretrained=MODEL, tokenizer=TOKENIZER, batch_size=2, max_length=20)
    assert [answer.text for answer in found] == reference.generate_until(asked(prompts), disable_tqdm=True)


class Countdown:
    """A model that writes its last token minus one, down to 0; it counts the rows that it computes."""

    def parameters(self) -> list[Any]:
        return []

    def __init__(self) -> None:
        self.inner = MODEL
        self.rows: list[int] = []
        self.device, self.dtype, self.config = MODEL.device, MODEL.dtype, MODEL.config

    def __call__(self, input_ids: Any, **options: Any) -> Any:
        self.rows.append(len(input_ids))
        found = self.inner(input_ids=input_ids, **options)
        kept = options.get("logits_to_keep")
        shown = input_ids if kept is None else input_ids[:, kept]
        found.logits = torch.nn.functional.one_hot((shown - 1).clamp(min=0), 16).float()
        return found

    forward = MODEL.forward


def decode(tokens: list[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


def test_rows_leave_when_they_end_and_others_take_their_place() -> None:
    model = Countdown()
    generator = Generator(model, decode, ends=frozenset({0}), batch_size=4)
    starts = [9, 2, 3, 1, 8, 2, 9, 5]
    found = generator.answer([Request(prompt=(4, start), limit=6) for start in starts])
    assert [list(answer.tokens) for answer in found] == [list(range(s - 1, -1, -1))[:6] for s in starts]
    assert [answer.ended for answer in found] == [start <= 6 for start in starts]
    # Without refilling, two batches of four would need 6 steps each.
    assert max(model.rows) == 4
    assert sum(model.rows) < 2 * 6 * 4


def test_stop_strings_over_the_borders_of_tokens() -> None:
    generator = Generator(Countdown(), decode, ends=frozenset({0}), batch_size=2)
    requests = [
        Request(prompt=(4, 9), limit=8, stops=stops) for stops in (("7><6",), ("<3>",), ("x",), ("",))
    ]
    found = generator.answer(requests)
    assert [answer.tokens[-1] for answer in found] == [6, 3, 1, 1]
    assert [answer.ended for answer in found] == [True, True, False, False]


def test_a_draw_depends_on_its_own_request_only() -> None:
    sampling = Sampling(temperature=1.5, top_k=12, top_p=0.95)

    def request(*prompt: int, seed: int = 0) -> Request:
        return Request(prompt=prompt, limit=12, sampling=sampling, seed=(seed,))

    def answer(*requests: Request) -> list[tuple[int, ...]]:
        generator = Generator(MODEL, decode, ends=frozenset(), batch_size=3)
        return [found.tokens for found in generator.answer(requests)]

    together = answer(request(4, 5, 6), request(7), request(4, 5, 6, seed=1), request(8, 9))
    torch.manual_seed(3)
    assert together[:1] == answer(request(4, 5, 6))
    assert together[3:] == answer(request(8, 9))
    assert together[0] != together[2]


@pytest.mark.parametrize("share", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(share: dict[str, Any]) -> None:
    generator = Generator(MODEL, decode, ends=frozenset(), batch_size=2)
    greedy, drawn = generator.answer(
        [Request(prompt=(4, 5), limit=6), Request(prompt=(4, 5), limit=6, sampling=Sampling(**share))]
    )
    assert greedy.tokens == drawn.tokens


def test_what_is_not_supported_is_left_to_transformers() -> None:
    def read(**options: Any) -> Any:
        return options_of(MODEL, {"until": ["x"], **options}, 7)

    assert read().limit == 7
    assert read().sampling is None
    assert read(do_sample=True, temperature=0.5).sampling == Sampling(temperature=0.5, top_k=50, top_p=1.0)
    for other in ({"num_beams": 2}, {"repetition_penalty": 1.1}, {"do_sample": True}):
        assert read(**other) is None
    beams = live().generate(asked(["a b", "c"], num_beams=2), seed=0)
    expected = HFLM(pretrained=MODEL, tokenizer=TOKENIZER, batch_size=4).generate_until(
        asked(["a b", "c"], num_beams=2), disable_tqdm=True
    )
    assert [answer.text for answer in beams] == expected


def test_a_models_own_penalty_is_not_overlooked() -> None:
    model = new_model()
    model.generation_config.repetition_penalty = 1.3
    assert options_of(model, {}, 7) is None


def test_models_that_continue_from_trees() -> None:
    assert agrees(MODEL, [[4, 5, 6, 7], [8, 9]])
    assert not agrees(MODEL, [[4]])

    class Deaf(transformers.LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
            **options: Any,
        ) -> Any:
            return super().forward(
                input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **options
            )

    deaf = Deaf(MODEL.config).eval()
    deaf.load_state_dict(MODEL.state_dict())
    assert not agrees(deaf, [[4, 5, 6, 7], [8, 9]])
