//! The way to the API server.

use std::time::Duration;

use kube::Config;

/// How long the API server may say nothing to what it was asked. A watch, which may have nothing to tell, is over before that.
const SILENCE: Duration = Duration::from_secs(90);

/// The same way, on which nothing is waited for without end.
///
/// A request that has arrived at a server which then loses its power is answered by nobody, and no packet says so: the watch of sessions,
/// or its list, would be waited for as long as the process lives.
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
    use kube::{Api, Client, api::ListParams, core::DynamicObject, discovery::ApiResource};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_list_that_stops_in_mid_answer_is_not_waited_for_without_end() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = format!("http://{}", server.local_addr().unwrap());
        let asked = async {
            let config = within(Config::new(address.parse().unwrap()), Duration::from_millis(200));
            let sessions = ApiResource::erase::<crds::AgenticSession>(&());
            let sessions: Api<DynamicObject> = Api::all_with(Client::try_from(config).unwrap(), &sessions);
            tokio::time::timeout(Duration::from_secs(20), sessions.list(&ListParams::default())).await
        };
        let half = async {
            let (mut connection, _) = server.accept().await.unwrap();
            let mut request = [0; 4_096];
            assert!(connection.read(&mut request).await.unwrap() > 0);
            let begin = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{\"kind\": ";
            connection.write_all(begin.as_bytes()).await.unwrap();
            connection
        };
        let (answer, _connection) = tokio::join!(asked, half);
        assert!(answer.expect("it is waited for").is_err());
    }
}
