"""Tables and figures from results files; nothing here trains, loads a model or imports torch."""
