"""The lists of cases hold what the suite promises, and every case has a miniature."""

from __future__ import annotations

from benchmarks.ops.cases import MODELS, QWEN_3B, AdvantageCase, HeadCase, LossCase, cpu_cases, gpu_cases, smoke_cases


def test_names_are_unique() -> None:
    for cases in (cpu_cases(), gpu_cases()):
        assert len({case.name for case in cases}) == len(cases) == len(set(cases))


def test_a_gpu_gets_the_target_first_and_then_every_model_in_every_way() -> None:
    cases = gpu_cases()
    heads = [case for case in cases if isinstance(case, HeadCase)]
    assert cases[0] == HeadCase(QWEN_3B, 16_384, every_rival=True)
    assert (QWEN_3B.hidden_size, QWEN_3B.vocab_size) == (2048, 151_936)
    for model in MODELS:
        mine = [case for case in heads if case.model == model]
        assert {case.objective for case in mine} == {"token", "sequence", "forward"}
        assert {(case.num_tokens, case.frozen_head) for case in mine} == {(t, f) for t in (2048, 16_384) for f in (False, True)}
        for num_tokens in (2048, 16_384):
            for frozen in (False, True):
                shares = {x.dead_share for x in mine if (x.num_tokens, x.frozen_head) == (num_tokens, frozen)}
                assert shares >= {0.0, 0.25, 0.5, 0.75}
        assert {case.entropy for case in mine if case.objective == "forward"} == {False, True}
        assert any(case.entropy for case in mine if case.objective == "token")
    assert any(isinstance(case, LossCase) for case in cases)
    assert any(isinstance(case, AdvantageCase) for case in cases)


def test_the_first_case_of_a_cpu_is_the_promised_one() -> None:
    case = cpu_cases()[0]
    assert isinstance(case, HeadCase)
    assert (case.num_tokens, case.model.hidden_size, case.model.vocab_size, case.dtype) == (2048, 576, 49_152, "float32")
    assert case.num_flops == 6 * 2048 * 576 * 49_152


def test_miniatures_keep_what_makes_a_case() -> None:
    for case in [*cpu_cases(), *gpu_cases()]:
        small = case.smoke()
        assert type(small) is type(case)
        if isinstance(case, HeadCase) and isinstance(small, HeadCase):
            assert small.num_flops < 1e8
            assert (small.objective, small.frozen_head, small.dead_share, small.entropy, small.every_rival) == (
                case.objective,
                case.frozen_head,
                case.dead_share,
                case.entropy,
                case.every_rival,
            )
    assert len(smoke_cases()) > 100
