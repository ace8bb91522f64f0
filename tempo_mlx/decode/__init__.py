"""The generation loop: requests, scheduler, decoder, verification; its results and prompt files."""
