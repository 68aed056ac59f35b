//! What goes on after a runner or an agent died, with the real CLI.
