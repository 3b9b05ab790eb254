"""What one process tells the others, however long it is."""

import numpy as np
import pytest

from dvi_jax.learn import shared_directory


@pytest.mark.parametrize("size", [0, 1, 7, 8, 21])
def test_a_message_of_any_length_is_heard_piece_by_piece(monkeypatch, size):
    """Both sides take part in as many broadcasts of as many bytes, none longer than a piece; minus zero included."""
    message = np.full(size, 0x80, np.uint8).tobytes()
    sent, heard = [], []
    monkeypatch.setattr(shared_directory, "PIECE", 7)

    def send(piece):
        sent.append(np.array(piece))
        return piece

    def receive(piece):
        assert not piece.any()
        assert piece.shape == sent[len(heard)].shape
        heard.append(sent[len(heard)])
        return heard[-1]

    monkeypatch.setattr(shared_directory.multihost_utils, "broadcast_one_to_all", send)
    shared_directory._tell(message)
    monkeypatch.setattr(shared_directory.multihost_utils, "broadcast_one_to_all", receive)
    assert shared_directory._hear() == message
    assert len(heard) == len(sent) == 1 + -(-size // 7)
    assert max(map(len, sent[1:]), default=0) <= 7
