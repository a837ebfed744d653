"""From a trained model to a folder others can load: adapter, merged weights or full model, card, push."""
