"""From files to chunks: read records, render them with the model's chat template, pack them into rows."""
