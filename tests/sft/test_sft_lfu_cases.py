"""LfU once more, from its sheet: float64 copies of the model against the trainer, in the setups it allows."""

import copy

import pytest
import support
import torch
from peft import get_peft_model
from test_sft_lfu import Gradients, trainer

from posttrain.selection.packed import SUFFIX
from posttrain.selection.plan import SelectionPlan, TensorSelection
from posttrain.selection.settings import Select
from posttrain.sft.lfu import LfU


def recorded(run):
    """Let the trainer tell the batches it trains and climbs on, and check that each micro-batch ends where it
    began."""
    batches, others, moved = [], [], []
    micro, draw, training_step = run._micro_step, run._another, run.training_step

    def copied(batch):
        return {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}

    def micro_step(model, inputs):
        batches.append(copied(inputs))
        return micro(model, inputs)

    def another():
        batch = draw()
        others.append(copied(batch))
        return batch

    def step(model, *arguments):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        loss = training_step(model, *arguments)
        after = dict(model.named_parameters())
        moved.extend(name for name in before if not torch.equal(before[name], after[name]))
        return loss

    run._micro_step, run._another, run.training_step = micro_step, another, step
    return batches, others, moved


def untouched(run, *, tied=False, adapter=False):
    """Return a model with the weights that the run starts from, and nothing of the trainer on it."""
    model = support.model(tied=tied)
    model = get_peft_model(model, support.lora()) if adapter else model
    model.load_state_dict(support.weights(run.model))
    return model.eval()


def by_copies(model, batches, others, method, names):
    """Return sum over micro-batches of the gradient of the SFT loss at theta and of the penalty at theta'."""
    here = copy.deepcopy(model).double()
    for name, parameter in here.named_parameters():
        parameter.requires_grad_(name in names)

    def fed(batch):
        return {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}

    def negative_log_likelihood(net, batch):
        logits, labels = net(**fed(batch), use_cache=False).logits, batch["labels"]
        place = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        chosen = logits[:, :-1].log_softmax(-1)[place].gather(1, labels[:, 1:][place][:, None])
        return -chosen.sum()

    def states(net, batch):
        # the layers themselves, without the head
        inner = net.get_base_model().model if hasattr(net, "get_base_model") else net.model
        found = inner(**fed(batch), use_cache=False, output_hidden_states=True).hidden_states
        return torch.stack([h[batch["labels"] != -100] for h in found])

    def gradients(net, value):
        net.zero_grad()
        value.backward()
        trained = {name: p for name, p in net.named_parameters() if name in names}
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}

    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total, penalties = {}, []
    for batch, other in zip(batches, others, strict=True):
        parts = [gradients(here, negative_log_likelihood(here, batch) / tokens)]
        counted = int((batch["labels"] != -100).sum())
        climb = gradients(here, negative_log_likelihood(here, other))
        length = sum(float(g.square().sum()) for g in climb.values()) ** 0.5
        if counted and length:
            there = copy.deepcopy(here)
            for name, parameter in there.named_parameters():
                if name in names:
                    parameter.data += climb[name] * (method.alpha / length)
            with torch.no_grad():
                wanted = states(here, batch)
            square = (wanted - states(there, batch)) ** 2
            layers, _, width = square.shape
            penalty = square.sum() / (layers * counted * (width if method.reduce_hidden == "mean" else 1))
            penalties.append(float(penalty))
            parts.append(gradients(there, penalty * method.weight / len(batches)))
        for part in parts:
            for name, gradient in part.items():
                total[name] = total.get(name, 0) + gradient
    return total, penalties


CASES = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "packed": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "padding free": {"packing": True, "packing_strategy": "bfd", "max_length": 48},
    "one row": {"per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_gradient_is_that_of_two_models(case, adapter, tmp_path):
    gradients, method = Gradients(), LfU(alpha=0.3, weight=4.0)
    settings = {"max_steps": 1} | CASES[case]
    peft = support.lora() if adapter else None
    run = trainer(tmp_path, [method], adapter=peft, callbacks=[gradients], **settings)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    start = untouched(run, adapter=adapter)
    batches, others, moved = recorded(run)
    run.train()
    assert moved == []
    (found,) = gradients.found
    wanted, penalties = by_copies(start, batches, others, method, found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=5e-4, atol=3e-6, msg=name)
    ((logged,),) = support.logged(run, "lfu/consistency")
    assert logged == pytest.approx(sum(penalties) / len(batches), rel=1e-3)
    plain, _ = by_copies(start, batches, others, LfU(alpha=0.3, weight=0.0), found)
    assert max((wanted[n] - plain[n]).abs().max().item() for n in wanted) > 1e-4


def test_the_last_window_of_an_epoch_is_divided_by_what_it_holds(tmp_path):
    """24 rows in batches of 4, five to a step: the second step has one micro-batch."""
    gradients, method = Gradients(), LfU(alpha=0.3, weight=4.0)
    run = trainer(
        tmp_path,
        [method],
        callbacks=[gradients],
        max_steps=2,
        gradient_accumulation_steps=5,
        learning_rate=0.0,
        weight_decay=0.0,
    )
    start = untouched(run)
    batches, others, moved = recorded(run)
    run.train()
    assert moved == []
    assert len(batches) == 6
    for found, part in zip(gradients.found, (slice(0, 5), slice(5, 6)), strict=True):
        wanted, _ = by_copies(start, batches[part], others[part], method, found)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name].double(), value, rtol=5e-4, atol=3e-6, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_autocast_sees_the_moved_weights(tied, tmp_path):
    """Cached casts of the weights would make the two models equal, and the penalty 0."""
    gradients, method = Gradients(), LfU(alpha=0.5, weight=4.0)
    run = trainer(
        tmp_path, [method], model=support.model(tied=tied), callbacks=[gradients], max_steps=1, bf16=True
    )
    start = untouched(run, tied=tied)
    batches, others, moved = recorded(run)
    run.train()
    assert moved == []
    assert run.model.dtype == torch.float32
    (found,) = gradients.found
    wanted, (penalty,) = by_copies(start, batches, others, method, found)
    ((logged,),) = support.logged(run, "lfu/consistency")
    assert logged == pytest.approx(penalty, rel=0.05)
    flat = [torch.cat([part[name].double().flatten() for name in wanted]) for part in (found, wanted)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.995
    assert (flat[0].norm() / flat[1].norm()).item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_batch_without_a_token_that_counts_gives_no_step(dtype, tmp_path):
    """Its gradient is zero: the penalty is 0 and the step is that of supervised training."""
    runs = []
    for number, methods in enumerate(([LfU()], [])):
        run = trainer(tmp_path / str(number), methods, dtype=dtype, max_steps=2)
        if methods:
            draw = run._another

            def empty(draw=draw):
                batch = draw()
                batch["labels"].fill_(-100)
                return batch

            run._another = empty
        run.train()
        runs.append(run)
    support.assert_same(*(support.weights(run.model) for run in runs))
    assert support.logged(runs[0], "lfu/consistency", "lfu/gradient_norm") == [(0.0, 0.0), (0.0, 0.0)]


@pytest.mark.parametrize("ascent", ["fresh", "same"])
def test_only_what_is_selected_climbs(ascent, tmp_path):
    """The length of the step is over the scalars that train, so a mask and packed values agree."""
    found = {}
    for backend in ("packed", "masked"):
        model, generator = support.model(), torch.Generator().manual_seed(5)
        chosen = {
            name: torch.randperm(parameter.numel(), generator=generator)[: parameter.numel() // 10]
            for name, parameter in model.named_parameters()
            if name.endswith(("q_proj.weight", "down_proj.weight"))
        }
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        plan = SelectionPlan.for_model(
            model, {name: TensorSelection.of("elements", shapes[name], at) for name, at in chosen.items()}
        )
        gradients, method = Gradients(), LfU(alpha=0.5, weight=8.0, ascent_batch=ascent)
        run = trainer(
            tmp_path / backend,
            [method],
            model=model,
            selection=Select(plan, backend=backend),
            callbacks=[gradients],
            max_steps=1,
        )
        _, _, moved = recorded(run)
        run.train()
        assert moved == []
        (logged,) = support.logged(run, "lfu/consistency", "lfu/gradient_norm")
        parts = {name.removesuffix(SUFFIX): value for name, value in gradients.found[0].items()}
        at = {name: positions.sort().values for name, positions in chosen.items()}
        found[backend] = (
            logged,
            {
                name: parts[name] if backend == "packed" else parts[name].flatten()[at[name]]
                for name in chosen
            },
        )
    assert found["masked"][0] == pytest.approx(found["packed"][0], rel=1e-4)
    assert found["packed"][0][0] > 1e-4
    for name, value in found["packed"][1].items():
        torch.testing.assert_close(found["masked"][1][name], value, rtol=1e-4, atol=1e-7)
