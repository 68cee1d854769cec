"""Put bundles and quantized checkpoints on the hub, each with a card that says what it is and how to run it.

`card.py` writes the card, also for `quantize`. `push.py` uploads.
"""
