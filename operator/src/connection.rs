//! The way to the API server.

use std::time::Duration;

use kube::Config;

/// How long the API server may say nothing to what it was asked. A watch, which may have nothing to tell, is over before that.
const SILENCE: Duration = Duration::from_secs(90);

/// The same way, on which nothing is waited for without end.
///
/// A request that has arrived at a server which then loses its power is answered by nobody, and no packet says so: whoever waits for it,
/// the list of a watch or the end of what outlived its session, would wait for as long as the process lives.
pub fn bounded(config: Config) -> Config {
    within(config, SILENCE)
}

fn within(mut config: Config, silence: Duration) -> Config {
    config.read_timeout = Some(silence);
    // Else it counts from when the connection was used before.
    config.reset_reader_on_write = true;
    config
}

#[cfg(test)]
mod tests {
    use kube::Client;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_takes_a_request_and_never_answers_is_not_waited_for_without_end() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = format!("http://{}", server.local_addr().unwrap());
        let asked = async {
            let config = within(Config::new(address.parse().unwrap()), Duration::from_millis(200));
            let client = Client::try_from(config).unwrap();
            tokio::time::timeout(Duration::from_secs(20), client.apiserver_version()).await
        };
        let takes = async { server.accept().await.unwrap() };
        let (answer, _connection) = tokio::join!(asked, takes);
        assert!(answer.expect("it is waited for").is_err());
    }
}
