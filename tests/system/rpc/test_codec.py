import struct
import tracemalloc
from typing import get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.errors import ProtocolError
from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc.commands import (
    CallDone,
    CallFunction,
    CallModel,
    Command,
    DatasetOpened,
    Done,
    Echo,
    Echoed,
    Example,
    Fetch,
    Fetched,
    FunctionDone,
    Hook,
    HostStore,
    JoinGroups,
    LoadModel,
    Mean,
    ModelLoaded,
    Offload,
    OpenDataset,
    OpenFunction,
    Release,
    Reshard,
    Result,
    Save,
    ShardFile,
    StoreAddress,
)
from trainmaster.system.rpc.framing import PROTOCOL_VERSION
from trainmaster.system.rpc.inquiries import Inquire, Order, Refuse, RunStatus, WorkerState, WorkerStatus
from trainmaster.system.rpc.messages import (
    Cancel,
    Executing,
    Failure,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Register,
    Reply,
    Request,
    Shutdown,
    Success,
    Welcome,
)
from trainmaster.system.rpc.parcels import Parcel, Redistribute
from trainmaster.system.service.lifecycle import State
from wire import head

text = st.text(max_size=8)
words = st.text(st.characters(exclude_categories=["C"]), max_size=8)
counts = st.integers(0, 2**63 - 1)
integers = st.integers(-(2**63), 2**63 - 1)
positive = st.floats(0, 1e300)


def tuples(items: st.SearchStrategy, max_size: int = 3) -> st.SearchStrategy:
    return st.lists(items, max_size=max_size).map(tuple)


lengths = st.integers(0, 2**31 - 1)


def columns(num_samples: int) -> st.SearchStrategy[KeyColumn]:
    return st.builds(
        KeyColumn,
        dtype=text,
        lengths=st.lists(lengths, min_size=num_samples, max_size=num_samples),
        trailing=tuples(counts),
    )


samples = tuples(text).flatmap(
    lambda ids: st.builds(Samples, ids=st.just(ids), keys=st.dictionaries(text, columns(len(ids)), max_size=2))
)
parcels = st.builds(
    Parcel,
    peers=st.lists(lengths, min_size=1, max_size=3).map(tuple),
    wave=st.integers(0, 2),
    blocks=tuples(samples, 2),
)
redistributes = st.builds(Redistribute.of, tag=counts, sends=tuples(parcels, 2), receives=tuples(parcels, 2))
hooks = st.one_of(
    st.builds(Save, model=text, directory=text),
    st.builds(Reshard, source=text, target=text, eta=st.floats(0, 1, exclude_min=True)),
    st.builds(Offload, model=text),
)
commands = st.one_of(
    st.just(HostStore()),
    st.just(Echo()),
    st.builds(JoinGroups, store_host=text, store_port=integers),
    st.builds(LoadModel, model=text),
    st.builds(OpenDataset, graph=text),
    st.builds(OpenFunction, graph=text, call=text),
    st.builds(Fetch, graph=text, start=counts, count=counts),
    st.builds(CallFunction, graph=text, call=text, samples=samples),
    st.tuples(text, text, samples).map(
        lambda drawn: CallModel(graph=drawn[0], call=drawn[1], samples=drawn[2], sizes=(1,) * len(drawn[2]))
    ),
    redistributes,
    st.builds(Release, ids=tuples(text)),
)
means = st.builds(Mean, total=st.floats(allow_nan=False), weight=st.floats(-1e300, 1e300))
results = st.one_of(
    st.just(Done()),
    st.just(Echoed()),
    st.builds(StoreAddress, host=text, port=integers),
    st.builds(ModelLoaded, num_parameters=counts),
    st.builds(DatasetOpened, num_sequences=counts, num_tokens=counts, longest=counts, longest_id=text),
    st.builds(Fetched, samples=samples),
    st.builds(
        CallDone,
        statistics=st.dictionaries(text, means, max_size=2),
        version=counts,
        outputs=st.none() | samples,
    ),
    st.builds(
        FunctionDone,
        statistics=st.dictionaries(text, means, max_size=2),
        outputs=samples,
        dropped=tuples(text),
        failures=tuples(text),
        examples=tuples(st.builds(Example, id=text, prompt=text, response=text, reward=st.none() | positive)),
    ),
)
shard_files = st.builds(ShardFile, tensors=tuples(text), file=text, size_bytes=counts)
outcomes = st.one_of(
    st.builds(Success, result=results, files=tuples(shard_files)),
    st.builds(Failure, kind=text, message=text, traceback=text, field=st.none() | text, value=text, rule=text),
)
MESSAGES = {
    Register: st.builds(
        Register,
        run=words,
        epoch=counts,
        host=words,
        pid=counts,
        incarnation=words,
        address=words,
        devices=tuples(words),
        versions=st.dictionaries(words, words, max_size=2),
        code_digest=words,
    ),
    Heartbeat: st.builds(
        Heartbeat, run=text, epoch=counts, executing=tuples(st.builds(Executing, id=counts, seconds=positive))
    ),
    Cancel: st.builds(Cancel, run=text, epoch=counts, id=counts),
    Reply: st.builds(
        Reply, run=text, epoch=counts, id=counts, outcome=outcomes, seconds=st.dictionaries(text, positive, max_size=2)
    ),
    Welcome: st.builds(
        Welcome,
        run=text,
        epoch=counts,
        rank=counts,
        num_workers=integers,
        num_local_workers=integers,
        overrides=tuples(text),
        experiment_digest=text,
        log_directory=text,
        orphan_s=positive,
        silence_s=st.floats(1e-3, 1e300),
    ),
    Refuse: st.builds(Refuse, reason=text),
    Inquire: st.builds(Inquire, order=st.sampled_from(Order)),
    RunStatus: st.builds(
        RunStatus,
        run=text,
        state=st.sampled_from(State),
        state_s=positive,
        up_s=positive,
        epoch=counts,
        host=text,
        pid=integers,
        num_workers=integers,
        workers=tuples(
            st.builds(
                WorkerStatus,
                rank=st.none() | integers,
                host=text,
                pid=integers,
                state=st.sampled_from(WorkerState),
                call=text,
                call_s=positive,
                heard_s=positive,
            )
        ),
        step=counts,
        num_steps=counts,
        values=st.dictionaries(text, st.floats(allow_nan=False), max_size=2),
    ),
    Ping: st.just(Ping()),
    Request: st.builds(
        Request,
        run=text,
        epoch=counts,
        id=counts,
        lane=st.sampled_from(Lane),
        deadline_s=st.floats(1e-3, 1e9),
        submitted_s=positive,
        command=commands,
        pre_hooks=tuples(hooks, 2),
        post_hooks=tuples(hooks, 2),
    ),
    Shutdown: st.builds(Shutdown, reason=text),
}
OURS = head(epoch=3)
COLUMN = KeyColumn(dtype="int64", lengths=(3, 4), trailing=(2,))
SAMPLES = Samples(ids=("a", "b"), keys={"tokens": COLUMN})
REQUEST = Request(
    run="first",
    epoch=3,
    id=5,
    lane=Lane.COMPUTE,
    deadline_s=60.0,
    submitted_s=1.5,
    step=2,
    command=CallModel(
        graph="sft",
        call="train",
        samples=SAMPLES,
        sizes=(2,),
    ),
    pre_hooks=(Reshard(source="actor", target="reference", eta=0.5),),
    post_hooks=(Save(model="actor", directory="here"),),
)


def echo(arrays: list[np.ndarray]) -> Request:
    command = Echo(content=tuple(arrays))
    return Request(run="first", epoch=1, id=5, lane=Lane.COMPUTE, deadline_s=60.0, submitted_s=0.0, command=command)


def body_of(message: Message) -> bytes:
    (body,) = codec.encode_body(message)
    assert isinstance(body, bytes)
    return body


def decoded(body: bytes) -> Message:
    return codec.decode_body([body])


def test_every_type_of_the_unions_is_tried():
    assert set(get_args(get_args(Message)[0])) == set(MESSAGES)
    assert len(get_args(get_args(Command)[0])) == len(commands.original_strategies)
    assert len(get_args(get_args(Result)[0])) == len(results.original_strategies)
    assert len(get_args(get_args(Hook)[0])) == len(hooks.original_strategies)


@settings(max_examples=60)
@given(st.one_of(*MESSAGES.values()))
def test_every_message_comes_back_as_it_was(message: Message):
    back = codec.decode_body(codec.encode_body(message))
    assert type(back) is type(message)
    assert back == message


def test_a_loss_that_is_not_finite_travels():
    mean = Mean(total=float("inf"), weight=1.0)
    outcome = Success(result=CallDone(statistics={"loss": mean}, version=1))
    reply = Reply(run="first", epoch=1, id=1, outcome=outcome, seconds={})
    assert codec.decode_body(codec.encode_body(reply)) == reply


def test_text_that_is_no_unicode_travels_escaped():
    """A file name that is no UTF-8 gets into an exception's text, and a worker must be able to report it."""
    outcome = Failure(kind="OSError", message="caf\udce9", traceback="")
    back = codec.decode_body(codec.encode_body(Reply(run="first", epoch=1, id=1, outcome=outcome, seconds={})))
    assert isinstance(back, Reply)
    assert isinstance(back.outcome, Failure)
    assert back.outcome.message == "caf\\udce9"


@given(st.binary(max_size=200))
def test_random_bytes_are_a_protocol_error(body: bytes):
    with pytest.raises(ProtocolError):
        decoded(body)


json_like = st.recursive(
    st.none() | st.booleans() | integers | st.floats() | text | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | st.sampled_from(["type"]), inner, max_size=3),
    max_leaves=8,
)


@given(json_like)
def test_msgpack_that_is_no_message_is_a_protocol_error(content: object):
    with pytest.raises(ProtocolError):
        decoded(msgpack.packb(content))


@pytest.mark.parametrize("type_", ["register", "heartbeat", "reply", "welcome", "refuse", "request", "shutdown", "x"])
def test_a_type_alone_is_no_message(type_: str):
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decoded(msgpack.packb({"type": type_}))


def test_every_truncation_is_a_protocol_error():
    body = body_of(REQUEST)
    for length in range(len(body)):
        with pytest.raises(ProtocolError, match="not msgpack that we accept"):
            decoded(body[:length])


@given(st.binary(min_size=1, max_size=5))
def test_trailing_bytes_are_a_protocol_error(extra: bytes):
    with pytest.raises(ProtocolError, match="not msgpack that we accept"):
        decoded(body_of(REQUEST) + extra)


@given(st.integers(0, len(body_of(REQUEST)) - 1), st.integers(1, 255))
def test_a_changed_byte_is_a_protocol_error_or_another_message(at: int, difference: int):
    """A letter of a name may change unseen; nothing but a message or a ProtocolError comes out."""
    body = bytearray(body_of(REQUEST))
    body[at] ^= difference
    try:
        message = decoded(bytes(body))
    except ProtocolError:
        return
    assert isinstance(message, Request)
    assert message != REQUEST


def places(content: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The path of every map in the content."""
    found = []
    if isinstance(content, dict):
        found.append(path)
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    else:
        return []
    return found + [place for key, value in items for place in places(value, (*path, key))]


CONTENT = msgpack.unpackb(body_of(REQUEST))
RECORDS = [path for path in places(CONTENT) if path[-1:] != ("keys",)]


def mutated(path: tuple[object, ...], change: str, field: str = "", value: object = None) -> bytes:
    content = msgpack.unpackb(body_of(REQUEST))
    record = content
    for key in path:
        record = record[key]
    if change == "drop":
        del record[field]
    else:
        record[field] = value
    return msgpack.packb(content)


@pytest.mark.parametrize("path", RECORDS, ids=str)
def test_an_unknown_field_anywhere_is_a_protocol_error(path: tuple[object, ...]):
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decoded(mutated(path, "set", "more", 1))


@pytest.mark.parametrize("field", ["type", "run", "epoch", "id", "lane", "command"])
def test_a_missing_field_is_a_protocol_error(field: str):
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decoded(mutated((), "drop", field))


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ((), "type", "reply"),
        ((), "type", None),
        ((), "epoch", -1),
        ((), "epoch", "one"),
        ((), "epoch", 1.5),
        ((), "lane", "other"),
        ((), "run", 3),
        ((), "command", {"type": "ping"}),
        ((), "command", []),
        ((), "pre_hooks", [{"type": "call_model"}]),
        ((), "post_hooks", "save"),
        (("command",), "kind", "destroy"),
        (("command",), "samples", []),
        (("command",), "sizes", "two"),
        (("command", "samples"), "ids", [1]),
        (("command", "samples"), "keys", {"tokens": None}),
        (("command", "samples", "keys", "tokens"), "lengths", ["x"]),
        (("pre_hooks", 0), "eta", -1),
    ],
)
def test_a_field_of_another_kind_is_a_protocol_error(path: tuple[object, ...], field: str, value: object):
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decoded(mutated(path, "set", field, value))


@pytest.mark.parametrize("num_frames", [0, 2 + framing.MAX_ARRAYS])
def test_a_message_has_a_bounded_number_of_frames(num_frames: int):
    with pytest.raises(ProtocolError, match=f"{num_frames} frames where a message has 1"):
        codec.decode([OURS] * num_frames)


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_an_envelope_comes_back_as_it_was(version: int, epoch: int, order: int, received: int):
    envelope = framing.Envelope(epoch=epoch, order=order, received=received, version=version)
    assert framing.opened(envelope.around([b"message", b"array"])) == (envelope, [b"message", b"array"])


@pytest.mark.parametrize("first", [b"", b"OTHER", OURS[:-1], b"GET / HTTP/1.1\r\n", b"x" * len(OURS)])
def test_another_envelope_is_refused(first: bytes):
    with pytest.raises(ProtocolError, match="another program's"):
        codec.decode([first])


def test_a_message_of_another_version_is_not_read():
    with pytest.raises(ProtocolError, match=f"protocol version 99, not {PROTOCOL_VERSION}"):
        codec.decode([head(version=99) + b"whatever"])


def test_a_body_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codec, "MAX_BODY_BYTES", 20)
    with pytest.raises(ProtocolError, match="a frame of 21 bytes is over the limit of 20"):
        decoded(bytes(21))
    with pytest.raises(ProtocolError, match=r"a refuse message of \d+ bytes is over the limit of 20"):
        codec.encode_body(Refuse(reason="x" * 30))


def test_arrays_come_back_as_they_were_and_the_large_in_frames_of_their_own():
    made = [
        np.zeros((0, 3), "int64"),
        np.array(True),
        np.arange(24, dtype="float16").reshape(2, 3, 4),
        np.arange(10, dtype="uint64")[::2],
        np.arange(2**14, dtype="float16").reshape(2, 2**12, 2),
        np.arange(2**14, dtype="uint64")[::2],
        *(np.ones(num_values, dtype) for dtype in codec.DTYPES for num_values in (3, 5000)),
    ]
    body = codec.encode_body(echo(made))
    assert [len(frame) for frame in body[1:]] == [array.nbytes for array in made if array.nbytes > 4096]
    back = codec.decode_body(body)
    assert isinstance(back, Request)
    assert isinstance(back.command, Echo)
    for was, came in zip(made, back.command.content, strict=True):
        assert (came.dtype, came.shape) == (was.dtype, was.shape)
        assert np.array_equal(came, was)


def test_arrays_are_not_copied():
    array = np.arange(1000)
    body = codec.encode_body(echo([array]))
    assert np.shares_memory(np.frombuffer(body[1], np.uint8), array)
    back = codec.decode_body(body)
    assert isinstance(back, Request)
    assert isinstance(back.command, Echo)
    assert np.shares_memory(back.command.content[0], array)


FLOAT32 = codec.DTYPES.index(np.dtype("float32"))


def array_head(frame: int, dtype: int, *shape: int) -> bytes:
    return struct.pack(f">BB{len(shape)}Q", frame, dtype, *shape)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (array_head(0, FLOAT32, 2), "in 4 bytes"),
        (array_head(0, FLOAT32, 2**62, 4), "in 4 bytes"),
        (array_head(0, FLOAT32, *[1] * 9), "head has 74 bytes"),
        (array_head(0, FLOAT32, 1) + b"x", "head has 11 bytes"),
        (array_head(0, FLOAT32, 1)[:-1], "head has 9 bytes"),
        (b"", "head has 0 bytes"),
        (b"\0", "head has 1 bytes"),
        (array_head(0, len(codec.DTYPES), 1), "an array of type 12"),
        (array_head(1, FLOAT32, 1), "where 0 is next"),
        (array_head(255, FLOAT32, 1), "where 0 is next"),
    ],
)
def test_an_array_that_is_not_what_its_frame_holds_is_refused(head: bytes, message: str):
    content = msgpack.unpackb(body_of(echo([])))
    content["command"]["content"] = [msgpack.ExtType(1, head)]
    with pytest.raises(ProtocolError, match=message):
        codec.decode_body([msgpack.packb(content), bytes(4)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "head says that it has 0"),
        (array_head(1, FLOAT32, 1)[:-1], "head says that it has 1"),
        (array_head(9, FLOAT32, *[1] * 9) + bytes(4), "head says that it has 9"),
        (array_head(1, FLOAT32, 2) + bytes(4), "in 4 bytes"),
        (array_head(2, FLOAT32, 2**62, 4), "in 0 bytes"),
        (array_head(1, len(codec.DTYPES), 1) + bytes(4), "an array of type 12"),
    ],
)
def test_a_small_array_that_is_not_what_its_head_says_is_refused(content: bytes, message: str):
    told = msgpack.unpackb(body_of(echo([])))
    told["command"]["content"] = [msgpack.ExtType(2, content)]
    with pytest.raises(ProtocolError, match=message):
        decoded(msgpack.packb(told))


def test_every_frame_is_read_and_none_twice():
    body = codec.encode_body(echo([np.ones(600)]))
    with pytest.raises(ProtocolError, match="2 arrays came, 1 are in the message"):
        codec.decode_body([*body, b""])
    with pytest.raises(ProtocolError, match="an array in frame 0 of 0"):
        codec.decode_body(body[:1])
    with pytest.raises(ProtocolError, match="holds at most 64"):
        codec.encode_body(echo([np.ones(600)] * (framing.MAX_ARRAYS + 1)))


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 100_000,  # depth
        b"\x81\xa1a" * 100_000,
        b"\xdd\xff\xff\xff\xff",  # counts
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\x00\x10\x00\x00" * 20,
        b"\xc4\x01x",  # raw bytes
        b"\xd4\x01x",  # extension types
        b"\xd6\xff\x00\x00\x00\x00",
        b"\x81\x01\x01",  # a map's key that is no text
    ],
)
def test_nothing_large_or_foreign_is_built(body: bytes):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decoded(body)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
