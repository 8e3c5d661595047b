"""What a call's keys are called on either side: by the graph, and by the algorithm or function that it runs.

    graph      chosen    tokens                  scores
                  |         |                       ^
    remaps     tokens    prompt   input_remap       |   output_remap
                  v         v                       |
    algorithm  tokens    prompt  ...........  log_probabilities

Both remaps are read here as what an algorithm asks for: where is what I know by this name? So nothing is renamed in
turns, and two keys may swap names.
"""

from __future__ import annotations

from .graph import Call


def input_keys(call: Call) -> dict[str, str]:
    """The graph's key of each input, by the algorithm's name, in the order of `call.inputs`."""
    return {call.input_remap.get(key, key): key for key in call.inputs}


def output_keys(call: Call) -> dict[str, str]:
    """The graph's key of each output, by the algorithm's name, in the order of `call.outputs`."""
    names = {key: name for name, key in call.output_remap.items()}
    return {names.get(key, key): key for key in call.outputs}
