"""What only a large model needs: adapters, float32 copies of bfloat16 weights, a memory estimate."""
