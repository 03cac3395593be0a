//! From a URL, the environment and options to an engine and a prefix within it.
//!
//! The only place that knows how each cloud is configured. Nothing is contacted here.

use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    BackoffConfig, Certificate, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig,
};
use url::{Host, Url};

use super::aws_profile;
use super::error::{StoreError, one_line};
use super::http_note::NotingConnector;
use super::options::{MissingFolder, StoreOptions};
use crate::trust::Trust;

/// Engines, and where in them the store begins.
pub(super) struct Backend {
    pub engines: Engines,
    pub prefix: Path,
    pub url: String,
}

/// The same place, for different kinds of requests.
pub(super) struct Engines {
    pub engine: Arc<dyn ObjectStore>,
    /// For reads over a network: no retries of its own, no limit on the whole, notes on every answer.
    pub reads: Option<Arc<dyn ObjectStore>>,
    /// For writes in pieces, over a network.
    pub uploads: Option<Arc<dyn MultipartStore>>,
    /// What an unreachable one should hint at; `None` for stores that need no network.
    pub network: Option<NetworkHint>,
}

impl Engines {
    /// Of an engine that needs no network.
    pub(super) fn local(engine: Arc<dyn ObjectStore>) -> Self {
        Self { engine, reads: None, uploads: None, network: None }
    }
}

/// What to say when a network store does not answer.
#[derive(Debug, Clone)]
pub(super) struct NetworkHint(pub String);

/// Opens `url`; a text without `://` is a path.
pub(super) fn open(url: &str, options: &StoreOptions) -> Result<Backend, StoreError> {
    let bad = |detail: String| StoreError::BadUrl { url: url.to_owned(), detail };
    let Some((scheme, rest)) = url.split_once("://") else {
        if url.trim().is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        return open_folder(url, FsPath::new(url), options);
    };
    if scheme == "file" {
        if !rest.starts_with('/') {
            return Err(bad(format!("file URLs are absolute: 'file:///…', or the path '{rest}'")));
        }
        let parsed = Url::parse(url).map_err(|e| bad(e.to_string()))?;
        let path = parsed.to_file_path().map_err(|()| bad("it names no path".to_owned()))?;
        return open_folder(url, &path, options);
    }
    let parsed = Url::parse(url).map_err(|e| bad(e.to_string()))?;
    let prefix = Path::from_url_path(parsed.path()).map_err(|e| bad(e.to_string()))?;
    let bucket = parsed.host_str().unwrap_or_default();
    if scheme != "memory" && bucket.is_empty() {
        return Err(bad(format!("it names no bucket: {scheme}://BUCKET/PREFIX")));
    }
    let engines = match scheme {
        "memory" => Engines::local(Arc::new(InMemory::new())),
        "s3" | "s3a" => open_s3(url, bucket, options)?,
        "gs" => open_gcs(url, options)?,
        "az" | "azure" | "abfs" | "abfss" => open_azure(url, options)?,
        other => {
            let known = "s3://, gs://, az://, file:///, memory:/// or a path";
            return Err(bad(format!("'{other}' is not one of {known}")));
        }
    };
    let url = url.trim_end_matches('/').to_owned();
    Ok(Backend { engines, prefix, url })
}

fn open_folder(url: &str, folder: &FsPath, options: &StoreOptions) -> Result<Backend, StoreError> {
    let failed = |error: std::io::Error| {
        let wrapped = object_store::Error::Generic { store: "file", source: Box::new(error) };
        StoreError::from_engine(url, "open", "", &wrapped)
    };
    let folder: PathBuf = std::path::absolute(folder).map_err(failed)?;
    if !folder.is_dir() {
        match options.missing_folder {
            MissingFolder::Create => std::fs::create_dir_all(&folder).map_err(failed)?,
            MissingFolder::Refuse => {
                let detail = format!("there is no folder {}", folder.display());
                return Err(StoreError::BadUrl { url: url.to_owned(), detail });
            }
        }
    }
    // Durable on return, like a cloud store: a manifest must not survive its objects.
    let engine = LocalFileSystem::new_with_prefix(&folder)
        .map_err(|e| StoreError::from_engine(url, "open", "", &e))?
        .with_fsync(true);
    let url = match Url::from_directory_path(&folder) {
        Ok(url) => url.as_str().trim_end_matches('/').to_owned(),
        Err(()) => url.to_owned(),
    };
    let engines = Engines::local(Arc::new(engine));
    Ok(Backend { engines, prefix: Path::default(), url })
}

/// The two engines of a cloud's builder: see [`Engines::reads`]. A macro, because the builders
/// have the same methods and no trait for them.
macro_rules! engines {
    ($url:expr, $builder:expr, $client:expr, $options:expr, $hint:expr) => {{
        let (builder, client) = ($builder, $client);
        let failed = |error: object_store::Error| bad_url($url, &error);
        let reads = builder
            .clone()
            .with_client_options(client.clone().with_timeout_disabled())
            .with_retry(RetryConfig { max_retries: 0, ..retry($options) })
            .with_http_connector(NotingConnector::default());
        let engine = builder.with_client_options(client).with_retry(retry($options));
        let engine = Arc::new(engine.build().map_err(failed)?);
        Ok(Engines {
            uploads: Some(engine.clone()),
            engine,
            reads: Some(Arc::new(reads.build().map_err(failed)?)),
            network: Some(NetworkHint($hint)),
        })
    }};
}

fn open_s3(url: &str, bucket: &str, options: &StoreOptions) -> Result<Engines, StoreError> {
    let mut settings = settings("aws_", options);
    let profile = aws_profile::settings(&settings)
        .map_err(|detail| StoreError::BadUrl { url: url.to_owned(), detail })?;
    settings.splice(0..0, profile);
    let mut builder = AmazonS3Builder::new();
    let mut client = client_options(options);
    for (key, value) in &settings {
        match key.parse::<AmazonS3ConfigKey>() {
            Ok(AmazonS3ConfigKey::Client(key)) => client = client.with_config(key, value),
            Ok(key) => builder = builder.with_config(key, value),
            // The AWS tools read many more AWS_* names than apply here.
            Err(_) => {}
        }
    }
    let endpoint = ["aws_endpoint_url_s3", "aws_endpoint_url", "aws_endpoint"]
        .into_iter()
        .find_map(|name| find(&settings, name));
    if let Some(endpoint) = endpoint {
        check_endpoint(url, endpoint)?;
        builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
        if endpoint.starts_with("http://") {
            client = client.with_allow_http(true);
        }
        if is_on_this_machine(endpoint) && find(&settings, "aws_proxy_url").is_none() {
            // The demonstration's own server is not to be looked for behind the hospital's proxy. To
            // name a proxy and exclude every name and address from it is how the engine is told "none".
            client =
                client.with_proxy_url("http://127.0.0.1:9").with_proxy_excludes("*,0.0.0.0/0,::/0");
        }
    }
    if std::env::var_os(OWN_S3_VARIABLE).is_some_and(|value| value == "1") {
        client = with_own_authority(url, client)?;
    }
    if let Some(file) = find(&settings, "aws_ca_bundle") {
        client = with_ca_bundle(url, client, file)?;
    }
    let mut hint = match endpoint {
        Some(endpoint) => format!("is {endpoint} (AWS_ENDPOINT_URL) right, and is it up?"),
        None => "check the network, or set AWS_ENDPOINT_URL for a store that is not AWS".to_owned(),
    };
    if !has_s3_credentials(&settings) {
        hint.push_str(" No credentials are set (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), so the machine's role was asked for.");
    }
    engines!(url, builder.with_bucket_name(bucket), client, options, hint)
}

fn has_s3_credentials(settings: &[(String, String)]) -> bool {
    [
        "aws_access_key_id",
        "access_key_id",
        "aws_skip_signature",
        "aws_web_identity_token_file",
        "aws_container_credentials_relative_uri",
        "aws_container_credentials_full_uri",
    ]
    .into_iter()
    .any(|name| find(settings, name).is_some())
}

fn open_gcs(url: &str, options: &StoreOptions) -> Result<Engines, StoreError> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_url(url);
    for (key, value) in &options.settings {
        if let Ok(key) = key.parse::<GoogleConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let hint = "check the network and GOOGLE_APPLICATION_CREDENTIALS".to_owned();
    engines!(url, builder, client_options(options), options, hint)
}

fn open_azure(url: &str, options: &StoreOptions) -> Result<Engines, StoreError> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_url(url);
    for (key, value) in &options.settings {
        if let Ok(key) = key.parse::<AzureConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let hint = "check the network and AZURE_STORAGE_ACCOUNT_NAME".to_owned();
    engines!(url, builder, client_options(options), options, hint)
}

/// Environment first, explicit settings after it, so that the latter win; names in lower case.
fn settings(prefix: &str, options: &StoreOptions) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .map(|(key, value)| (key.to_ascii_lowercase(), value))
        .filter(|(key, value)| key.starts_with(prefix) && !value.is_empty())
        .collect();
    // The environment has no order of its own; aliases must not win by chance.
    all.sort();
    all.extend(options.settings.iter().map(|(k, v)| (k.to_ascii_lowercase(), v.clone())));
    all
}

fn find<'a>(settings: &'a [(String, String)], name: &str) -> Option<&'a str> {
    settings.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

fn check_endpoint(url: &str, endpoint: &str) -> Result<(), StoreError> {
    match Url::parse(endpoint) {
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") && parsed.has_host() => Ok(()),
        _ => Err(StoreError::BadUrl {
            url: url.to_owned(),
            detail: format!(
                "its endpoint '{endpoint}' (AWS_ENDPOINT_URL) should look like http://HOST:PORT"
            ),
        }),
    }
}

fn is_on_this_machine(endpoint: &str) -> bool {
    match Url::parse(endpoint).ok().as_ref().and_then(Url::host) {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Says (1) that the endpoint is an S3 server of the run's own (`cpcr s3`), which proves itself by the join token. Not by
/// itself: whoever holds that could then stand in for anybody's.
const OWN_S3_VARIABLE: &str = "CPCR_OWN_S3";

/// With the token's authority among those that are believed.
fn with_own_authority(url: &str, client: ClientOptions) -> Result<ClientOptions, StoreError> {
    let bad = |detail| StoreError::BadUrl { url: url.to_owned(), detail };
    let trust = Trust::from_environment().map_err(|error| bad(error.to_string()))?;
    let Some(der) = trust.certificate() else { return Ok(client) };
    let certificate =
        Certificate::from_der(der).map_err(|error| bad(one_line(&error.to_string())))?;
    Ok(client.with_root_certificate(certificate))
}

fn with_ca_bundle(
    url: &str,
    mut client: ClientOptions,
    file: &str,
) -> Result<ClientOptions, StoreError> {
    let bad = |why: String| StoreError::BadUrl {
        url: url.to_owned(),
        detail: format!("AWS_CA_BUNDLE '{file}' cannot be used: {why}"),
    };
    let pem = std::fs::read(file).map_err(|e| bad(e.to_string()))?;
    let certificates =
        Certificate::from_pem_bundle(&pem).map_err(|e| bad(one_line(&e.to_string())))?;
    if certificates.is_empty() {
        return Err(bad("it holds no certificate".to_owned()));
    }
    for certificate in certificates {
        client = client.with_root_certificate(certificate);
    }
    Ok(client)
}

fn client_options(options: &StoreOptions) -> ClientOptions {
    ClientOptions::new()
        .with_timeout(options.timeout)
        .with_connect_timeout(options.connect_timeout)
        .with_config(ClientConfigKey::UserAgent, concat!("cpcr/", env!("CARGO_PKG_VERSION")))
}

fn retry(options: &StoreOptions) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: std::time::Duration::from_millis(100),
            max_backoff: std::time::Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: options.retries,
        retry_timeout: options.deadline,
    }
}

fn bad_url(url: &str, error: &object_store::Error) -> StoreError {
    StoreError::BadUrl { url: url.to_owned(), detail: one_line(&error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(url: &str, options: &StoreOptions) -> String {
        match open(url, options) {
            Ok(_) => panic!("'{url}' was accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_url_that_names_no_store_is_refused_with_the_way_out() {
        let options = StoreOptions::default();
        assert!(detail("", &options).contains("empty"));
        assert!(detail("ftp://x/y", &options).contains("s3://"));
        assert!(detail("s3:///x", &options).contains("bucket"));
        assert!(detail("file://runs/x", &options).contains("file:///"));
        assert!(detail("/nonexistent/x", &options.clone().existing()).contains("no folder"));
        let endpoint = options.with("aws_endpoint", "localhost:9000");
        assert!(detail("s3://b/x", &endpoint).contains("http://HOST:PORT"));
    }

    #[test]
    fn explicit_settings_win_over_the_environment() {
        let options =
            StoreOptions::default().with("aws_endpoint", "one").with("AWS_ENDPOINT", "two");
        assert_eq!(find(&settings("aws_", &options), "aws_endpoint"), Some("two"));
    }
}
