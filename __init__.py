"""bitroute: quantize diffusers models layer by layer."""
