"""The subcommands of `diffad`, which `diffad.cli` names, and the options that they share."""
