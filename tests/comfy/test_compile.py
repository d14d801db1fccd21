"""compile_blocks on ComfyUI's own classes: the same gradients, few programs for many blocks, and a model given back as
it was."""

import contextlib
import dataclasses

import pytest
import torch
from trainyard.nodes import host
from trainyard.tests.comfy.families import TABLE, make
from trainyard.tests.comfy.test_host import ADAPTERS, RANK_4, Problem, as_loader_gives, fingerprint, left_behind, shake
from trainyard.tests.comfy.test_train_lora import job, result
from trainyard.trainers.memory import compile
from trainyard.trainers.memory.compile import COMPILED_GRADIENT_TOLERANCE
from trainyard.trainers.memory.plan import PLAN_OFF, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU
from trainyard.trainers.settings import AdapterSettings


@pytest.fixture(autouse=True)
def a_compiler_that_needs_nothing(monkeypatch):
    """Traced and differentiated as for users, and run by torch's own operations: what the C++ compiler adds is tested
    in tests/unit."""
    monkeypatch.setattr(compile, "COMPILE_BACKEND", "aot_eager")


def gradients(session, family):
    found, problem = [], Problem(session, family)
    shake(session.adapters)
    for strength in (1.0, -1.0):
        with session.adapters.at_strength(strength):
            found.append(problem.gradient(session.adapters))
    return torch.cat(found)


@pytest.mark.parametrize(
    "family, plans",
    [
        ("sdxl", [PLAN_PER_BLOCK_CPU]),
        ("sd3", [PLAN_OFF, PLAN_PER_BLOCK_CPU]),
        ("flux", [PLAN_PER_BLOCK_CPU]),
        ("qwen", [PLAN_OFF]),
    ],
    ids=["sdxl", "sd3", "flux", "qwen"],
)
def test_compiled_blocks_give_the_same_gradients_and_leave_the_model_as_it_was(family, plans):
    model, said = as_loader_gives(family), []
    before = fingerprint(model)
    with torch.inference_mode(), host.session.open_training_session(model, ADAPTERS.get(family, RANK_4)) as session:
        plain, classes = (
            gradients(session, family),
            host.context.find_block_classes(session.denoiser.model.diffusion_model),
        )
        forwards = {cls: cls.forward for cls in classes}
    for plan in plans:
        with (
            torch.inference_mode(),
            host.session.open_training_session(
                model, ADAPTERS.get(family, RANK_4), checkpointing=plan, compiling=said.append
            ) as session,
        ):
            got = gradients(session, family)
            programs = len(session.blocks.compiler.programs)
        assert not said and 0 < programs <= 2 * 10, "one for every kind of block, shape and strength"
        assert float((got - plain).norm() / plain.norm()) <= COMPILED_GRADIENT_TOLERANCE
    assert fingerprint(model) == before and left_behind(model) == []
    assert all(cls.forward is not forwards[cls] for cls in forwards)
    assert not any(
        hasattr(cls.forward, "_torchdynamo_orig_callable") or cls.forward.__name__ == "run" for cls in forwards
    )


def test_blocks_that_differ_in_their_place_only_share_a_program(monkeypatch):
    """Flux with five double and five single blocks: two programs."""
    monkeypatch.setitem(TABLE["flux"].config, "depth", 5)
    monkeypatch.setitem(TABLE["flux"].config, "depth_single_blocks", 5)
    said = []
    with (
        torch.inference_mode(),
        host.session.open_training_session(make("flux", inference=True), RANK_4, compiling=said.append) as session,
    ):
        shake(session.adapters)
        Problem(session, "flux").loss()
        assert len(session.blocks.compiler.programs) == 2
    assert not said


def test_a_compiled_run_ends_near_the_plain_one(folders):
    plain = result(job(name="plain"))[0]
    a_job = dataclasses.replace(
        job(name="compiled", model=make("sd3", inference=True), checkpointing=PLAN_PER_BLOCK), compile_blocks=True
    )
    lora, _, line = result(a_job)
    size = sum(float(plain[k].square().sum()) for k in plain) ** 0.5
    distance = sum(float((lora[k] - plain[k]).square().sum()) for k in plain) ** 0.5
    assert distance / size < 1e-3, "six steps of AdamW, which divides small gradients by themselves"
    assert "not compiled" not in line


def test_where_nothing_can_be_compiled_the_node_says_so_and_the_file_is_the_same(folders, monkeypatch):
    plain = result(job(name="plain"))[0]
    shown = []
    monkeypatch.setattr(host.progress, "show_node_text", lambda line, node_id=None: shown.append(line))
    monkeypatch.setattr(compile, "COMPILE_BACKEND", no_compiler)
    a_job = dataclasses.replace(job(name="without", model=make("sd3", inference=True)), compile_blocks=True)
    lora, _, line = result(a_job)
    assert all(torch.equal(lora[k], plain[k]) for k in plain)
    told = [text for text in shown if text.startswith("Blocks are not compiled: this machine has no C++ compiler")]
    assert len(told) == 1 and line.endswith(told[0])


def test_a_backward_that_fails_to_compile_in_the_middle_of_a_step_costs_that_step_only(folders, monkeypatch):
    """As with a torch that makes the programs of backward late: the run goes on from the step before, without
    compiling."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.exc import InvalidCxxCompiler

    plain = result(job(name="plain"))[0]

    def nope(graph, inputs):
        raise InvalidCxxCompiler

    monkeypatch.setattr(compile, "patch_torch_config", lambda config, **values: contextlib.nullcontext())
    monkeypatch.setattr(
        compile, "COMPILE_BACKEND", aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=nope)
    )
    a_job = dataclasses.replace(job(name="late", model=make("sd3", inference=True)), compile_blocks=True)
    lora, losses, line = result(a_job)
    assert len(losses) == 6 and all(torch.equal(lora[k], plain[k]) for k in plain)
    assert "this machine has no C++ compiler" in line


def no_compiler(graph, inputs):
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_dropout_is_told_to_be_in_the_way_before_the_first_step():
    said = []
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            make("sd3", inference=True), AdapterSettings(rank=4, dropout=0.1), compiling=said.append
        ) as session,
    ):
        shake(session.adapters)
        Problem(session, "sd3").loss()
        assert not session.blocks.compiler.programs
    assert len(said) == 1 and "dropout" in said[0]


def test_a_patch_of_another_node_still_learns_which_block_it_is_called_from():
    """A model with patches shares no programs over places; the patch is told where it is."""
    model, seen = make("sd15", inference=True), set()

    def patch(n, context, value, options):
        seen.add(options["block"])
        return n, context, value

    model.set_model_attn1_patch(patch)
    with (
        torch.inference_mode(),
        host.session.open_training_session(model, RANK_4, compiling=lambda text: None) as session,
        torch.no_grad(),
    ):
        shake(session.adapters)
        Problem(session, "sd15").loss()
    assert len(seen) > 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_compiled_after_an_interrupt(error):
    model = make("sd3", inference=True)
    limit = torch._dynamo.config.recompile_limit
    with (
        contextlib.suppress(error),
        torch.inference_mode(),
        host.session.open_training_session(model, RANK_4, compiling=lambda text: None) as session,
    ):
        Problem(session, "sd3").loss()
        compiler = session.blocks.compiler
        raise error
    assert not compiler.programs and left_behind(model) == [] and torch._dynamo.config.recompile_limit == limit
