//! RabbitMQ's management API, by hand: HTTP/1.0, so that a reply ends where
//! the connection does.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::Value;
use url::Url;

/// A management API.
#[derive(Debug, Clone)]
pub struct Management {
    url: Url,
}

impl Management {
    /// Of the server at `url`.
    pub fn new(url: &str) -> Self {
        Self {
            url: Url::parse(url).expect("ACKONCE_MANAGEMENT_URL is a URL"),
        }
    }

    /// The user that logs in, here and over AMQP.
    pub fn user(&self) -> &str {
        match self.url.username() {
            "" => "guest",
            user => user,
        }
    }

    /// Its password.
    pub fn password(&self) -> String {
        let password = self.url.password().unwrap_or("guest");
        percent_decode_str(password)
            .decode_utf8_lossy()
            .into_owned()
    }

    /// Host.
    pub fn host(&self) -> &str {
        self.url.host_str().expect("a host")
    }

    /// Port.
    pub fn port(&self) -> u16 {
        self.url.port_or_known_default().expect("a port")
    }

    /// Makes `vhost` and lets the user do everything in it.
    pub fn create_vhost(&self, vhost: &str) {
        let user = encode(self.user());
        let vhost = encode(vhost);
        self.expect("PUT", &format!("/api/vhosts/{vhost}"), "{}");
        self.expect(
            "PUT",
            &format!("/api/permissions/{vhost}/{user}"),
            r#"{"configure":".*","write":".*","read":".*"}"#,
        );
    }

    /// Removes `vhost` with all that is in it. Failing is allowed: it is how
    /// a test cleans up.
    pub fn delete_vhost(&self, vhost: &str) {
        if let Err(e) = self.request("DELETE", &format!("/api/vhosts/{}", encode(vhost)), "") {
            eprintln!("failed to remove vhost {vhost}: {e}");
        }
    }

    /// Makes a user, or gives it another password, and lets it do everything in
    /// `vhost`.
    pub fn create_user(&self, user: &str, password: &str, vhost: &str) {
        let body = serde_json::json!({ "password": password, "tags": "" });
        self.put(&format!("/api/users/{}", encode(user)), &body);
        self.permit(user, vhost, ".*");
    }

    /// Lets `user` do everything in `vhost` with what `pattern` matches.
    pub fn permit(&self, user: &str, vhost: &str, pattern: &str) {
        let path = format!("/api/permissions/{}/{}", encode(vhost), encode(user));
        let body = serde_json::json!({ "configure": pattern, "write": pattern, "read": pattern });
        self.put(&path, &body);
    }

    /// Changes what is at `path`.
    pub fn put(&self, path: &str, body: &Value) {
        self.expect("PUT", path, &body.to_string());
    }

    /// Removes what is at `path`.
    pub fn delete(&self, path: &str) {
        self.expect("DELETE", path, "");
    }

    /// Removes `queue` of `vhost`.
    pub fn delete_queue(&self, vhost: &str, queue: &str) {
        let path = format!("/api/queues/{}/{}", encode(vhost), encode(queue));
        self.expect("DELETE", &path, "");
    }

    /// Names of the connections in `vhost`.
    pub fn connections(&self, vhost: &str) -> Vec<String> {
        let reply = self.get(&format!("/api/vhosts/{}/connections", encode(vhost)));
        let connections = reply.as_array().expect("a list of connections");
        connections
            .iter()
            .filter_map(|connection| connection["name"].as_str().map(str::to_owned))
            .collect()
    }

    /// Name of the connection in `vhost` that says to be for `purpose`, once
    /// the API knows of it.
    pub fn connection_of(&self, vhost: &str, purpose: &str) -> Option<String> {
        let reply = self.get(&format!("/api/vhosts/{}/connections", encode(vhost)));
        let connections = reply.as_array().expect("a list of connections");
        let said = |connection: &&Value| {
            let information = connection["client_properties"]["information"].as_str();
            information.is_some_and(|text| text.contains(purpose))
        };
        Some(connections.iter().find(said)?["name"].as_str()?.to_owned())
    }

    /// Closes the connection called `name`; false when it is gone already.
    pub fn close_connection(&self, name: &str) -> bool {
        let path = format!("/api/connections/{}", encode(name));
        self.request("DELETE", &path, "").is_ok()
    }

    /// What is at `path`, as JSON.
    pub fn get(&self, path: &str) -> Value {
        serde_json::from_slice(&self.expect("GET", path, "")).expect("JSON")
    }

    /// What is at `path`, as JSON; `None` when the server does not say.
    pub fn try_get(&self, path: &str) -> Option<Value> {
        let content = self.request("GET", path, "").ok()?;
        serde_json::from_slice(&content).ok()
    }

    /// What is at `path`, as it is; `None` when the server has no such thing.
    pub fn download(&self, path: &str) -> Option<Vec<u8>> {
        match self.request("GET", path, "") {
            Ok(content) => Some(content),
            Err(error) if error.contains("404") => None,
            Err(error) => panic!("failed to GET {path}: {error}"),
        }
    }

    /// Publishes to `queue` of `vhost` through the HTTP API, as rabbitmqadmin
    /// does. `properties` is JSON.
    pub fn publish(&self, vhost: &str, queue: &str, payload: &str, properties: &str) {
        let path = format!("/api/exchanges/{}/amq.default/publish", encode(vhost));
        let properties: Value = serde_json::from_str(properties).expect("JSON");
        let body = serde_json::json!({
            "routing_key": queue, "payload": payload, "payload_encoding": "string",
            "properties": properties,
        });
        let reply = self.expect("POST", &path, &body.to_string());
        assert!(String::from_utf8_lossy(&reply).contains(r#""routed":true"#));
    }

    /// A server that has just started may lose a request; what may be said
    /// twice is.
    fn expect(&self, method: &str, path: &str, body: &str) -> Vec<u8> {
        let result = match self.request(method, path, body) {
            Err(error) if method != "POST" && !error.starts_with("status") => {
                eprintln!("{method} {path} once more: {error}");
                self.request(method, path, body)
            }
            result => result,
        };
        result.unwrap_or_else(|e| panic!("failed to {method} {path}: {e}"))
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Result<Vec<u8>, String> {
        let login = STANDARD.encode(format!("{}:{}", self.user(), self.password()));
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: {}\r\nAuthorization: Basic {login}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.host(),
            body.len()
        );
        let reply = self
            .exchange(request.as_bytes())
            .map_err(|e| e.to_string())?;
        let end = reply
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .ok_or("no end of headers")?;
        let head = String::from_utf8_lossy(&reply[..end]);
        let status = head.split(' ').nth(1).unwrap_or_default();
        if !status.starts_with('2') {
            return Err(format!("status {status}"));
        }
        Ok(reply[end + 4..].to_vec())
    }

    fn exchange(&self, request: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect((self.host(), self.port()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(request)?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply)?;
        Ok(reply)
    }
}

/// `text` as one segment of a path.
pub fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
