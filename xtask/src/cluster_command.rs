//! `cargo xtask cluster`.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt,
    path::PathBuf,
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use xtask::cluster::{self, Cluster, Extent};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Which cluster; several can be up at once.
    #[arg(long, global = true, default_value = "local", env = "AGENTIC_CLUSTER")]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start it; nothing happens if it is up.
    Up {
        /// Only etcd, API server and controller manager, without root.
        #[arg(long, conflicts_with = "egress")]
        control_plane: bool,
        /// Let pods reach the outside.
        #[arg(long)]
        egress: bool,
    },
    /// Stop it and delete all that it had.
    Down,
    /// Make images in OCI archives known to the node.
    Load {
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Run kubectl against it.
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// Run a command in its network namespace.
    Exec {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        words: Vec<OsString>,
    },
    /// Print the environment that makes kubectl and helm use it.
    Env,
    /// Forward a port of the host's loopback to an address in its network namespace, until interrupted.
    Forward {
        /// Port of 127.0.0.1; 0 for any that is free.
        port: u16,
        /// Address and port inside, such as a Service's or a pod's.
        to: SocketAddr,
    },
    /// Forwarder of a running cluster.
    #[command(hide = true)]
    Forwarder {
        listen: SocketAddr,
        namespace: PathBuf,
        to: SocketAddr,
    },
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let cluster = Cluster::named(&arguments.name)?;
    match arguments.action {
        Action::Up { control_plane, egress } => {
            let extent = match (control_plane, egress) {
                (true, _) => Extent::ControlPlane,
                (false, true) => Extent::NodeWithEgress,
                (false, false) => Extent::Node,
            };
            cluster.up(extent)?;
            eprintln!("export KUBECONFIG={}", cluster.kubeconfig().display());
            Ok(())
        }
        Action::Down => cluster.down(),
        Action::Load { archives } => cluster.load(&archives),
        Action::Kubectl { words } => {
            // Replaces this process, so that signals and the exit code are kubectl's.
            let error = cluster.kubectl()?.args(words).exec();
            Err(error).context("failed to start kubectl: is the cluster up?")
        }
        Action::Exec { words } => {
            let error = cluster.inside("env").args(words).exec();
            Err(error).context("failed to enter the cluster's network namespace")
        }
        Action::Env => {
            println!("export KUBECONFIG={}", cluster.kubeconfig().display());
            Ok(())
        }
        Action::Forward { port, to } => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).context("failed to listen")?;
            println!("http://{}", listener.local_addr()?);
            cluster::forward(&listener, &cluster.namespace(), to)
        }
        Action::Forwarder { listen, namespace, to } => {
            let listener = TcpListener::bind(listen).context("failed to listen")?;
            cluster::forward(&listener, &namespace, to)
        }
    }
}
