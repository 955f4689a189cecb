"""Publication on the Hub: files, model card, licences."""
