"""Who holds which prefix: prompts that were sent, blocks that instances say they hold. Pure, but for subscriber.py."""
