"""The OpenAI-compatible front door: picks instances, hands prompts off from prefill to decode, passes answers on."""
