"""The generation loop: requests, scheduler, decoder, retroactive pruning, verification."""
