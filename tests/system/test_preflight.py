import json
from pathlib import Path

import pytest
from trainmaster.api.config import Dataset, Layout, LoRA, Model, Optimizer, RunOptions
from trainmaster.api.errors import ConfigError, DataError
from trainmaster.api.experiments.answers import AnswerEvaluation
from trainmaster.api.experiments.sft import SFT
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.system.preflight import check_files, check_run_directory, claim_run_directory

ROW = '{"prompt": "a", "answer": "b"}\n'


def model_folder(folder: Path, config: str = '{"model_type": "qwen2", "num_hidden_layers": 2}') -> Path:
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(b"")
    return path


def check(folder: Path, **fields) -> None:
    (folder / "rows.jsonl").write_text(ROW)
    check_files(SFT(**{"dataset": Dataset(path=folder / "rows.jsonl"), **fields}).compile())


def test_a_whole_experiment_passes(tmp_path: Path):
    check(tmp_path, model=Model(path=model_folder(tmp_path), layout=Layout(pp=2)))


def test_a_folder_without_a_config_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path = '.*': there is no config\.json in it\. Name a Hugging Face"):
        check(tmp_path, model=Model(path=tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    path = model_folder(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.path = '.*': there are no weights .* in it\. Convert the model"):
        check(tmp_path, model=Model(path=path))


def test_a_config_that_is_not_json_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path = '.*config\.json': not JSON \(.*\. Restore the file"):
        check(tmp_path, model=Model(path=model_folder(tmp_path, "{")))


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.tokenizer = '.*none': there is no such directory\. Name the tok"):
        check(tmp_path, model=Model(path=model_folder(tmp_path), tokenizer=tmp_path / "none"))


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_stages_are_not_more_than_layers(tmp_path: Path, name: str):
    path = model_folder(tmp_path, json.dumps({"model_type": "x", name: 2}))
    with pytest.raises(ConfigError, match=r"model\.layout\.pp = 3: the model has only 2 layers\. Lower it\."):
        check(tmp_path, model=Model(path=path, layout=Layout(pp=3)))


def test_the_layers_of_a_model_from_a_config_count_too(tmp_path: Path):
    config = {"model_type": "qwen2", "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"model\.layout\.pp = 2: the model has only 1 layers"):
        check(tmp_path, model=Model(config=config, tokenizer=tmp_path, layout=Layout(pp=2)))


def test_a_number_of_layers_that_is_no_number_is_refused_by_name(tmp_path: Path):
    config = {"model_type": "qwen2", "num_hidden_layers": "4"}
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        check(tmp_path, model=Model(config=config, tokenizer=tmp_path, layout=Layout(pp=2)))


def test_a_number_of_layers_that_is_null_says_nothing(tmp_path: Path):
    config = {"model_type": "qwen2", "num_layers": None, "num_hidden_layers": 4}
    check(tmp_path, model=Model(config=config, tokenizer=tmp_path, layout=Layout(pp=2)))


@pytest.mark.parametrize(
    ("config", "pp", "says"),
    [
        ({"model_type": "bert"}, 1, r"model\.config\.model_type = 'bert': .*is an encoder\. Use another type"),
        ({"model_type": "qwen22"}, 1, r"model\.config\.model_type = 'qwen22': .*You may mean qwen2"),
        ({"model_type": "gemma3n_text"}, 2, r"model\.config\.model_type = .*cannot be cut\. Set layout\.pp"),
        ({"model_type": "falcon", "alibi": True}, 1, r"with alibi = True has wrong.*Set alibi to False"),
    ],
)
def test_a_model_type_that_did_not_pass_is_refused(tmp_path: Path, config: dict[str, object], pp: int, says: str):
    with pytest.raises(ConfigError, match=says):
        check(tmp_path, model=Model(config=config, tokenizer=tmp_path, layout=Layout(pp=pp)))


def test_a_checkpoint_of_such_a_type_is_refused_by_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path = 'bert': model type 'bert' is an encoder"):
        check(tmp_path, model=Model(path=model_folder(tmp_path, '{"model_type": "bert"}')))


def test_a_type_that_runs_one_sequence_a_call_trains_but_does_not_generate(tmp_path: Path):
    model = Model(path=model_folder(tmp_path, '{"model_type": "lfm2"}'))
    check(tmp_path, model=model)
    answers = AnswerEvaluation(
        dataset=Dataset(path=tmp_path / "rows.jsonl"),
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=8),
    )
    with pytest.raises(ConfigError, match=r"'lfm2' has no cached decode .*cannot generate\. Use a type that decodes"):
        check(tmp_path, model=model, answers=answers, run=RunOptions(evaluate_every=1))


def test_a_repository_in_the_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = Model(path=Path("some/model"))
    with pytest.raises(ConfigError, match=r"model\.path = 'some/model': there is no config.*`hf download some/model`"):
        check(tmp_path, model=model)
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    model_folder(cached / "snapshots").rename(cached / "snapshots" / "abc")
    check(tmp_path, model=model)


def test_both_datasets_are_checked(tmp_path: Path):
    model = Model(path=model_folder(tmp_path))
    with pytest.raises(DataError, match=r"^dataset\.path = '.*none': cannot be read"):
        check(tmp_path, model=model, dataset=Dataset(path=tmp_path / "none"))
    with pytest.raises(DataError, match=r"^evaluation\.path = '.*none': cannot be read"):
        check(tmp_path, model=model, evaluation=Dataset(path=tmp_path / "none"))


@pytest.mark.parametrize(("room", "fields"), [(8, {}), (5, {"microbatch_tokens": 5})])
def test_the_longest_response_leaves_room_for_a_prompt(tmp_path: Path, room: int, fields: dict[str, int]):
    path = model_folder(tmp_path, '{"model_type": "qwen2", "max_position_embeddings": 8}')

    def answers(max_new_tokens: int) -> AnswerEvaluation:
        return AnswerEvaluation(
            dataset=Dataset(path=tmp_path / "rows.jsonl"),
            reward=Reward(function="exact_match"),
            sampling=Sampling(max_new_tokens=max_new_tokens),
        )

    check(tmp_path, model=Model(path=path), answers=answers(room - 1), **fields)
    with pytest.raises(ConfigError, match=rf"answers\.sampling\.max_new_tokens = {room}: leaves no room .* {room}"):
        check(tmp_path, model=Model(path=path), answers=answers(room), **fields)


def test_a_run_directory_is_claimed_once(tmp_path: Path):
    path = tmp_path / "runs" / "first"
    check_run_directory(path)
    claim_run_directory(path).close()
    assert path.is_dir()
    for claim in (claim_run_directory, check_run_directory):
        with pytest.raises(
            ConfigError, match=r"run\.name = 'first': .* exists already, .*\. Choose another name \(--run\.name first-2"
        ):
            claim(path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.directory = '.*file': cannot be written: Not a directory\. Choose"):
        claim_run_directory(tmp_path / "file" / "first")


def adapter_folder(folder: Path, **config: object) -> Path:
    path = folder / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, **config}))
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 16}, r"model\.lora\.r = 8: .*adapter_config\.json says 16\. Set it to 16"),
        ({"lora_alpha": 32}, r"model\.lora\.lora_alpha = 8: .* says 32"),
        ({"use_rslora": True}, r"model\.lora\.use_rslora = False: .* says True"),
        (
            {"use_dora": True, "bias": "all"},
            r"lora\.path = '.*adapter': its adapters have use_dora, bias 'all', and this",
        ),
        ({"init_lora_weights": "pissa"}, r"its adapters have init_lora_weights 'pissa'.* merge these into their model"),
        ({"peft_type": "LOHA"}, r"its adapters have peft_type 'LOHA'"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(tmp_path: Path, config: dict[str, object], message: str):
    path = adapter_folder(tmp_path, **config)
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, model=Model(path=model_folder(tmp_path), lora=LoRA(path=path)))


def test_adapters_that_compute_the_same_pass(tmp_path: Path):
    path = adapter_folder(tmp_path, use_rslora=False, bias="none", init_lora_weights="gaussian", rank_pattern={})
    check(tmp_path, model=Model(path=model_folder(tmp_path), lora=LoRA(path=path)))


@pytest.mark.parametrize("name", ["use_bdlora", "kasa_config", "trainable_token_indices", "made_up_tomorrow"])
def test_what_peft_has_and_we_do_not_know_is_refused_by_name(tmp_path: Path, name: str):
    path = adapter_folder(tmp_path, **{name: {"a": 1}})
    with pytest.raises(
        ConfigError, match=rf"lora\.path = .*its adapters have {name}, and this version has none of that"
    ):
        check(tmp_path, model=Model(path=model_folder(tmp_path), lora=LoRA(path=path)))


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str):
    path, adapter = model_folder(tmp_path), adapter_folder(tmp_path)
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.lora\.path = '.*adapter_config\.json': holds no JSON object"):
        check(tmp_path, model=Model(path=path, lora=LoRA(path=adapter)))
    (path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.path = '.*config\.json': holds no JSON object .*\. Restore the"):
        check(tmp_path, model=Model(path=path))


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = model_folder(tmp_path)

    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read whatever its mode is
    with pytest.raises(ConfigError, match=r"model\.path = '.*config\.json': cannot be read: Permission denied\. Let"):
        check_files(SFT(dataset=Dataset(path=tmp_path / "rows.jsonl"), model=Model(path=path)).compile())


def test_the_state_of_an_optimizer_goes_with_the_weights_of_its_checkpoint(tmp_path: Path):
    path, adapter = model_folder(tmp_path), adapter_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.state = '.*model': there is no state of an optimizer"):
        check(tmp_path, model=Model(path=path), optimizer=Optimizer(state=path))
    for each in (path, adapter):
        (each / "optimizer").mkdir()
        (each / "optimizer" / "00001-of-00001.safetensors").write_bytes(b"")
    check(tmp_path, model=Model(path=path), optimizer=Optimizer(state=path / "." / "optimizer" / ".."))
    check(tmp_path, model=Model(path=path, lora=LoRA(path=adapter)), optimizer=Optimizer(state=adapter))
    config = {"model_type": "qwen2", "num_hidden_layers": 2}
    for model, state, says in (
        (
            Model(path=path, lora=LoRA()),
            adapter,
            r"model\.lora\.path is None\. Name the same checkpoint as",
        ),
        (Model(path=path, lora=LoRA(path=adapter)), path, r"model\.lora\.path is /.*adapter\."),
        (Model(path=path), adapter, r"model\.path is /.*model\. Name the same checkpoint as model\.path"),
        (Model(config=config, tokenizer=tmp_path), path, r"model\.path is None"),
    ):
        with pytest.raises(ConfigError, match=rf"optimizer\.state = .* its own checkpoint, and {says}"):
            check(tmp_path, model=model, optimizer=Optimizer(state=state))


def test_a_folder_without_adapters_is_refused_and_one_of_adapters_is_no_model(tmp_path: Path):
    model, adapter = model_folder(tmp_path), adapter_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"lora\.path = '.*model': there is no adapter_config\.json in it"):
        check(tmp_path, model=Model(path=model, lora=LoRA(path=model)))
    with pytest.raises(ConfigError, match=r"model\.path = .* and this directory as model\.lora\.path"):
        check(tmp_path, model=Model(path=adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"there is no adapter_model\.safetensors in it"):
        check(tmp_path, model=Model(path=model, lora=LoRA(path=adapter)))
