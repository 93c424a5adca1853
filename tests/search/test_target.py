"""Targets: texts of limits, the calls that they are about, and a sentence for everything that cannot be asked for."""

import pytest

from secateur.deploy.target import DeployError
from secateur.errors import TargetError
from secateur.search.target import Call, Limit, Target, calls_of, make_target, parse_limit

ONNX = Call("onnx", 1, 128, 1)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("params<=0.5", Limit("params", 0.5)),
        ("params<=50%", Limit("params", 0.5)),
        ("params <= .5x", Limit("params", 0.5)),
        ("params<10M", Limit("params", 10e6, relative=False)),
        ("params<=1.5B", Limit("params", 1.5e9, relative=False)),
        ("params<=22000000", Limit("params", 22e6, relative=False)),
        ("macs<=0.4", Limit("macs", 0.4)),
        ("MACs<=2.5G", Limit("macs", 2.5e9, relative=False)),
        ("bytes<=50MB", Limit("bytes", 50e6, relative=False)),
        ("bytes<=50MiB", Limit("bytes", 50 * 2**20, relative=False)),
        ("bytes<=1.5GB", Limit("bytes", 1.5e9, relative=False)),
        ("bytes<=2GiB", Limit("bytes", 2 * 2**30, relative=False)),
        ("bytes<=1000", Limit("bytes", 1000.0, relative=False)),
        ("bytes<=500 kB", Limit("bytes", 500e3, relative=False)),
        ("memory<=200MB", Limit("memory", 200e6, relative=False, call=ONNX)),
        ("memory<=80%@onnxruntime", Limit("memory", 0.8, call=ONNX)),
        ("latency<=12ms", Limit("latency", 12.0, relative=False, call=ONNX)),
        ("latency<=0.012s", Limit("latency", 12.0, relative=False, call=ONNX)),
        ("latency<=900us", Limit("latency", 0.9, relative=False, call=ONNX)),
        ("latency<=12ms@openvino", Limit("latency", 12.0, relative=False, call=Call("openvino", 1, 128, 1))),
        ("latency<=0.5x@onnx", Limit("latency", 0.5, call=ONNX)),
        ("latency<=0.5 @ pytorch", Limit("latency", 0.5, call=Call("torch", 1, 128, 1))),
    ],
)
def test_a_text_is_a_limit(text, limit):
    found = parse_limit(text, ONNX)
    assert found.bound == pytest.approx(limit.bound)
    assert (found.quantity, found.relative, found.call) == (limit.quantity, limit.relative, limit.call)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("params", r"the limit 'params' cannot be read; write it like params<=50% or params<=10M, macs"),
        ("params>=0.5", r"the limit 'params>=0\.5' cannot be read; write it like"),
        ("flops<=0.5", r"no quantity 'flops' in 'flops<=0\.5'; there is params, macs, bytes, memory, latency"),
        ("params<=half", r"'half' in 'params<=half' is no bound; write params<=50% or params<=10M"),
        ("params<=", r"'' in 'params<=' is no bound; write params<=50%"),
        ("params<=-0.5", r"the bound of 'params<=-0\.5' is not positive; write params<=50%"),
        ("bytes<=0", r"the bound of 'bytes<=0' is not positive; write bytes<=50% or bytes<=50MB"),
        ("latency<=1e999ms", r"the bound of 'latency<=1e999ms' is not positive"),
        ("params<=1", r"'params<=1' allows 1 of what the dense model costs; ask for less than 1"),
        ("macs<=150%", r"'macs<=150%' allows 1\.5 of what the dense model costs; ask for less than 1"),
        ("latency<=2x", r"'latency<=2x' allows 2 of what the dense model costs; ask for less than 1"),
        ("bytes<=1.5", r"'bytes<=1\.5' allows 1\.5 of what the dense model costs; ask for less than 1"),
        ("latency<=12", r"the bound of 'latency<=12' cannot be read, as it has no unit; write latency<=0\.5x or"),
        ("bytes<=12ms", r"the bound of 'bytes<=12ms' cannot be read, as 'ms' is no unit of bytes; write bytes<=50%"),
        ("params<=10MB", r"the bound of 'params<=10MB' cannot be read, as 'MB' is no unit of params; write params"),
        ("params<=0.5@onnx", r"params is the same on every runtime; leave @onnx out of 'params<=0\.5@onnx'"),
        (
            "latency<=0.5x@tpu",
            r"no runtime 'tpu'; there is torch, secateur, onnx, openvino, executorch, litert, llama\.cpp",
        ),
        ("latency<=0.5x@", r"no runtime ''; there is torch, secateur"),
    ],
)
def test_a_text_that_is_no_limit_says_why(text, sentence):
    with pytest.raises(TargetError, match=sentence):
        parse_limit(text, ONNX)


@pytest.mark.parametrize("text", ["latency<=0.5x", "memory<=200MB"])
def test_a_limit_on_a_runtime_names_one(text):
    with pytest.raises(
        TargetError, match=rf"'{text}' does not say on which runtime; add --on RUNTIME, or write {text}@onnx"
    ):
        parse_limit(text)
    with pytest.raises(TargetError, match=rf"'{text}' does not say on which runtime"):
        make_target(limits=[text])


def test_a_speed_up_is_a_share_of_the_latency():
    found = make_target(speed_up=2, on="onnxruntime", max_drop=0.01, batch=4, length=64, threads=2)
    call = Call("onnx", 4, 64, 2)
    assert found == Target((Limit("latency", 0.5, call=call),), 0.01, call=call)


def test_limits_and_a_speed_up_hold_together():
    found = make_target(4, "onnx", ["params<=50%", "latency<=12ms@openvino"], batch=8, closest=True)
    assert [limit.quantity for limit in found.limits] == ["latency", "params", "latency"]
    assert found.limits[0].bound == pytest.approx(0.25)
    assert found.limits[2].call == Call("openvino", 8, 128, 1)
    assert (found.call, found.max_drop, found.closest) == (Call("onnx", 8, 128, 1), None, True)


def test_the_runtime_of_a_limit_is_the_one_that_results_are_timed_on():
    assert make_target(limits=["params<=0.5", "latency<=0.5@openvino"]).call == Call("openvino")
    assert make_target(limits=["params<=0.5"]).call is None


def test_weights_on_llama_cpp_have_a_format_and_others_have_none():
    assert make_target(1.5, "llama.cpp").call == Call("gguf", quantize="q8_0")
    found = make_target(1.5, "gguf", ["latency<=9ms@onnx"], quantize="Q4_0")
    assert [limit.call for limit in found.limits] == [Call("gguf", quantize="q4_0"), Call("onnx")]
    beside = make_target(2, "onnx", ["latency<=9ms@llama.cpp"], quantize="f16")
    assert calls_of(beside) == [Call("onnx"), Call("gguf", quantize="f16")]


def test_a_format_that_nothing_takes_and_one_that_there_is_not_are_refused():
    with pytest.raises(
        TargetError, match=r"'q4_0' is a format of weights on llama\.cpp, and nothing is asked for there"
    ):
        make_target(2, "onnx", quantize="q4_0")
    with pytest.raises(DeployError, match="no format 'q3' for GGUF; there is f32"):
        make_target(2, "llama.cpp", quantize="q3")


def test_a_drop_alone_asks_for_the_fastest():
    assert make_target(on="openvino", max_drop=0.0) == Target((), 0.0, call=Call("openvino"))


def test_a_divergence_stands_for_the_drop():
    found = make_target(2, "onnx", kl=0.05, confident=True)
    assert (found.max_drop, found.by_divergence, found.confident) == (0.05, True, True)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, r"nothing is asked for; say how fast \(--speed-up 2 --on onnx\), or how small \(--target 'params<=50%'\)"),
        ({"on": "onnx"}, r"nothing is asked for"),
        ({"speed_up": 1, "on": "onnx"}, r"a speed-up of 1 makes nothing faster; ask for more than 1"),
        ({"speed_up": -2, "on": "onnx"}, r"a speed-up of -2 makes nothing faster"),
        ({"speed_up": float("nan"), "on": "onnx"}, r"a speed-up of nan makes nothing faster"),
        ({"speed_up": float("inf"), "on": "onnx"}, r"a speed-up of inf makes nothing faster"),
        ({"speed_up": 2}, r"a speed-up of 2 depends on the runtime; add --on with one of torch, secateur, onnx"),
        ({"speed_up": 2, "on": "tpu"}, r"no runtime 'tpu'; there is torch"),
        ({"speed_up": 2, "on": "onxx"}, r"litert, llama\.cpp; did you mean onnx\?$"),
        (
            {"max_drop": 0.01},
            r"a drop of at most 0\.01 allows many results; add --on RUNTIME for the fastest, or limit",
        ),
        ({"speed_up": 2, "on": "onnx", "max_drop": -0.01}, r"the drop is a number from 0 upwards, not -0\.01"),
        ({"speed_up": 2, "on": "onnx", "kl": float("nan")}, r"the drop is a number from 0 upwards, not nan"),
        (
            {"speed_up": 2, "on": "onnx", "max_drop": 0.01, "kl": 0.1},
            r"the drop is limited twice, by the metric \(0\.01\) and by the divergence \(0\.1\); leave one out",
        ),
        ({"speed_up": 2, "on": "onnx", "confident": True}, r"confident is about the interval of a drop, and none is"),
        ({"speed_up": 2, "on": "onnx", "limits": ["latency<=9ms"]}, r"latency on onnx is limited twice; keep the"),
        ({"limits": ["params<=0.5", "params<=0.4"]}, r"params is limited twice; keep the tighter limit"),
        ({"limits": ["params<=0.5"], "batch": 0}, r"batch is at least 1, not 0"),
        ({"limits": ["params<=0.5"], "length": -1}, r"length is at least 1, not -1"),
        ({"limits": ["params<=0.5"], "threads": 0}, r"threads is at least 1, not 0"),
    ],
)
def test_what_cannot_be_asked_for_says_why(asked, sentence):
    with pytest.raises(TargetError, match=sentence):
        make_target(**asked)


def test_two_runtimes_may_limit_one_quantity():
    found = make_target(2, "onnx", ["latency<=0.6x@openvino"])
    assert [limit.call.runtime for limit in found.limits] == ["onnx", "openvino"]


def test_a_frontier_needs_a_runtime_and_nothing_else():
    assert make_target(on="onnx", frontier=(1.5, 2)) == Target(call=ONNX)
