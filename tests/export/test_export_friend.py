"""Published from a run by the command's own code, in one process; loaded in another that has no posttrain.

Both know the stand-in Hub by HF_ENDPOINT alone. The friend runs each card's code as it is printed, and the
ways of loading that transformers and PEFT document.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from export_hub_stand_in import TOKEN, HubStandIn, Repo
from export_models import tiny_llama, trained_adapter
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.export.verify import logits
from posttrain.models.embedded import build_tokenizer
from posttrain.run.directory import RunDirectory, write_json
from posttrain.run.manifest import build_manifest

IDS = torch.tensor([[20, 21, 22, 23, 24]])

AUTHOR = """
import json, sys
from pathlib import Path
from posttrain.run.verbs import export_path
for run, name, format in json.loads(sys.argv[1]):
    done = export_path(run, to=None, format=format, push_to=name, private=True)
    print(json.dumps(done))
"""

FRIEND = """
import json, re, sys
sys.modules["posttrain"] = None  # importing it fails
import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, found = torch.tensor(json.loads(sys.argv[1])), {}

@torch.no_grad()
def keep(name, model):
    found[name] = model.eval()(input_ids=ids).logits[0].tolist()

for name in json.loads(sys.argv[2]):
    card = open(hf_hub_download(name, "README.md"), encoding="utf-8").read()
    (code,) = re.findall(r"```python\\n(.*?)\\n```", card, re.DOTALL)
    variables = {}
    exec(code, variables)
    keep(f"card {name}", variables["model"])
    assert variables["tokenizer"].chat_template == AutoTokenizer.from_pretrained(name).chat_template
for name in ("user/adapter", "user/own"):
    keep(f"AutoPeft {name}", AutoPeftModelForCausalLM.from_pretrained(name))
    keep(f"AutoModel {name}", AutoModelForCausalLM.from_pretrained(name))
keep("AutoModel user/merged", AutoModelForCausalLM.from_pretrained("user/merged"))
keep("PeftModel", PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "user/adapter"))
try:
    import posttrain
except ImportError:
    json.dump(found, open("found.json", "w"))
"""


def make_run(root, model, tokenizer, base):
    run = RunDirectory(root)
    checkpoint = run.checkpoints / "checkpoint-3"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    if isinstance(model, PeftModel):
        path = checkpoint / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    write_json(checkpoint / "trainer_state.json", {"global_step": 3})
    config = {
        "task": "rlvr",
        "model": {"path": "org/base", "revision": None, "dtype": "auto", "trust_remote_code": False},
        "data": {"source": str(Path.home() / "private/rows.jsonl")},
        "trainer": {},
        "methods": {"ace": {"alpha": 0.5}},
    }
    run.config.write_text(yaml.safe_dump(config))
    data = {"fingerprint": "abc123"}
    write_json(run.manifest, build_manifest(config, data=data, command=["posttrain", "train", "x.yaml"]))
    estimate = {"metrics": {"pass@1": {"value": 0.75, "low": 0.5, "high": 0.875}}}
    write_json(run.evaluation, {"after": estimate})
    return str(root)


def process(code, *arguments, hub, folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(json.dumps, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_a_run_publishes_loads_with_transformers_and_peft_alone(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    start = tmp_path / "base"
    untrained = tiny_llama(tied=True, dtype=torch.bfloat16)
    untrained.generation_config.temperature, untrained.generation_config.do_sample = 0.7, True
    untrained.save_pretrained(start)
    tokenizer.save_pretrained(start)
    (start / "README.md").write_text("---\nlicense: other\nlicense_name: house-rules\n---\n")

    def begin():
        return AutoModelForCausalLM.from_pretrained(start)

    adapter, own = trained_adapter(begin()), trained_adapter(begin(), seed=2)
    whole = begin()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter[torch.rand(parameter.shape, generator=generator) < 0.02] *= 1.5

    runs = {name: tmp_path / name for name in ("adapter", "own", "whole")}
    RunDirectory(runs["own"]).warm_start.root.mkdir(parents=True)
    begin().save_pretrained(RunDirectory(runs["own"]).warm_start.model)
    with HubStandIn() as hub:
        hub.repos["org/base"] = Repo(private=False)
        base_files = {path.name: path.read_bytes() for path in start.iterdir()}
        hub.repos["org/base"].branches["main"] = base_files
        commit = hub.repos["org/base"].sha("main")
        make_run(runs["adapter"], adapter, tokenizer, "org/base")
        make_run(runs["own"], own, tokenizer, str(RunDirectory(runs["own"]).warm_start.model))
        make_run(runs["whole"], whole, tokenizer, None)
        jobs = [
            (str(runs["adapter"]), "user/adapter", "auto"),
            (str(runs["adapter"]), "user/merged", "merged"),
            (str(runs["own"]), "user/own", "auto"),
            (str(runs["whole"]), "user/delta", "delta"),
        ]
        said = process(AUTHOR, jobs, hub=hub, folder=tmp_path / "author")
        names = [name for _, name, _ in jobs]
        process(FRIEND, IDS.tolist(), names, hub=hub, folder=tmp_path / "friend")
        published = {name: repo.branches["main"] for name, repo in hub.repos.items()}
        assert all(repo.private for name, repo in hub.repos.items() if name.startswith("user/"))

    done = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [result["pushed"] for result in done] == [f"{hub.endpoint}/{name}" for name in names]
    found = json.loads((tmp_path / "friend/found.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(runs["adapter"] / "export-merged")
    expected = {"user/adapter": adapter, "user/merged": merged, "user/own": own, "user/delta": whole}
    assert len(found) == 4 + 4 + 1 + 1
    for way, values in found.items():
        model = adapter if way == "PeftModel" else expected[way.split()[-1]]
        trained, values = logits(model, [IDS])[0], torch.tensor(values)
        if way in ("AutoModel user/adapter", "AutoModel user/own"):  # transformers rounds adapters to bf16
            change = (trained - logits(begin(), [IDS])[0]).abs().max()
            assert (values - trained).abs().max() < 0.1 * change, way
        else:
            assert torch.equal(values, trained), way

    for name in names:
        card = ModelCard(published[name]["README.md"].decode())
        assert card.data.license == "other"
        assert card.data.to_dict()["license_name"] == "house-rules"
        assert card.data.base_model == ("user/own-base" if name == "user/own" else "org/base")
        assert f"Training started from `org/base` at revision `{commit}`" in card.text or name == "user/own"
        assert "https://arxiv.org/abs/2602.21420" in card.text
        assert "- fingerprint: `abc123`" in card.text
        assert "| pass@1 | 0.750 [0.500, 0.875] |" in card.text
        assert "~/private/rows.jsonl" in card.text
        assert {"generation_config.json", "config.json"} <= set(published[name]) or "adapter_config.json" in (
            published[name]
        )
    assert json.loads(published["user/adapter"]["adapter_config.json"])["revision"] == commit
    for name, files in published.items():
        for file, content in files.items():
            assert TOKEN.encode() not in content, (name, file)
            assert name == "org/base" or str(tmp_path).encode() not in content, (name, file)
    for path in tmp_path.glob("*/**/*"):
        if path.is_file() and "friend" not in path.parts:
            assert TOKEN.encode() not in path.read_bytes(), path
