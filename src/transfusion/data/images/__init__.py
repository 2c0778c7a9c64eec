"""Images as stored: their facts without decoding, their pixels, their latents."""
