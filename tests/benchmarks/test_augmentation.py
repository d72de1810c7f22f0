"""The benchmark of the data path: what it writes."""

import augmentation


def test_shares_are_those_of_the_measured_times():
    found = augmentation.measure(steps=10, batch_size=4)
    times = found["milliseconds"]
    assert set(times) == {"step", "batch", "augmented batch"}
    assert 0 < times["batch"] < times["augmented batch"] < times["step"]
    for kind, share in found["share_of_a_step"].items():
        assert abs(share - times[kind] / times["step"]) < 0.05
