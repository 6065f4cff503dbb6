"""One reader for each kind of checkpoint, behind the protocol in `base.py`."""
