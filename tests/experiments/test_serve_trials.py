"""What breaks a trial of a server that is killed."""

from experiments import serve_trials


def test_a_drafter_that_was_lost_breaks_the_trial():
    lives = [{"expected": 0, "first_updates": 0, "digest": "a"}, {"expected": 9, "first_updates": 9, "digest": "b"}]
    clients = serve_trials.Clients(0)
    clients.finished = 5
    assert not serve_trials.judge(lives, clients, 1)["broken"]
    assert serve_trials.judge([*lives, {"expected": 12, "first_updates": 9, "digest": "b"}], clients, 2)["broken"]
    clients.different = 1
    assert serve_trials.judge(lives, clients, 1)["broken"]
